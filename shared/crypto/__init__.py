"""The only package that imports `cryptography`'s ciphers: everything that touches a key stands here."""

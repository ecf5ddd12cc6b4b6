"""What the documentation's site is made with, beside docs/ itself.

diagrams.py   Mermaid's text → SVG, so that the site needs no script for its pictures
links.py      links of a checkout → links of the site
hooks.py      what MkDocs calls: the only module here that needs it
"""

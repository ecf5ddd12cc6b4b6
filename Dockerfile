# One image for every service of docker-compose.yml: `python -m <service> --config FILE`, as uid 10001.
#
# BASE_IMAGE is any Debian or Ubuntu with Python 3.11 or newer as python3, its venv module, and util-linux (setpriv).
# pip is configured as everywhere else: build arguments PIP_INDEX_URL, PIP_CERT and so on, none of which is kept.
ARG BASE_IMAGE=python:3.11.14-slim-bookworm

# --- build: dependencies as locked, and what Postgres loads; the compiler stays behind in this stage ---
FROM ${BASE_IMAGE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG PIP_CERT
ARG PIP_DEFAULT_TIMEOUT

RUN groupadd --gid 10001 keylake \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin keylake \
 && python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "BASE_IMAGE needs Python 3.11 or newer")'

WORKDIR /opt/keylake
COPY requirements.lock ./
RUN python3 -m venv venv \
 && venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --only-binary :all: --require-hashes \
      -r requirements.lock

ENV PATH=/opt/keylake/venv/bin:$PATH PYTHONPATH=/opt/keylake/app PYTHONDONTWRITEBYTECODE=1
COPY pageserver/__init__.py app/pageserver/__init__.py
COPY pageserver/redo app/pageserver/redo
COPY compute/__init__.py app/compute/__init__.py
COPY compute/guard app/compute/guard
COPY shared app/shared
# A `cc` that is ziglang's for any processor of this kind; by default it would be for this very one.
# initdb refuses to be root, so all of this is done by the user that will run it.
RUN printf '#!/bin/sh\nexec python -m ziglang cc -mcpu=baseline "$@"\n' > /usr/local/bin/cc \
 && chmod 755 /usr/local/bin/cc \
 && install -d -o keylake -g keylake -m 755 lib \
 && setpriv --reuid=10001 --regid=10001 --clear-groups -- env HOME=/tmp ZIG_GLOBAL_CACHE_DIR=/tmp/zig \
      sh -c 'python -c "import asyncio, pathlib; from pageserver.redo.build import prepare; print(asyncio.run(prepare(pathlib.Path(\"/opt/keylake/lib\"))))" \
       && python -c "import asyncio, pathlib; from compute.guard.build import prepare_guard; print(asyncio.run(prepare_guard(pathlib.Path(\"/opt/keylake/lib\"))))"' \
 && python -m pip uninstall --yes --quiet ziglang pip setuptools

COPY shared app/shared
COPY keymanager app/keymanager
COPY safekeeper app/safekeeper
COPY pageserver app/pageserver
COPY compute app/compute
COPY customercloud app/customercloud
COPY keylake app/keylake
RUN python -m compileall -q -j 0 app \
 && printf '#!/bin/sh\nexec python -m keylake.cli "$@"\n' > venv/bin/keylake \
 && printf '#!/bin/sh\nexec python3 -I -S /opt/keylake/app/keylake/ready.py "$@"\n' > venv/bin/keylake-ready \
 && chmod 755 venv/bin/keylake venv/bin/keylake-ready

# --- what runs ---
FROM ${BASE_IMAGE}
# Volumes take the owner of the directory that they are mounted over.
RUN groupadd --gid 10001 keylake \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin keylake \
 && install -d -o keylake -g keylake -m 700 /etc/keylake /var/lib/keylake /run/metadata /provision /observed \
 && for name in customercloud metadata minio keymanager keymanager-2 safekeeper-1 safekeeper-2 safekeeper-3 pageserver compute \
      proxy console operator; do install -d -o keylake -g keylake -m 700 "/provision/$name" "/observed/$name"; done
COPY --from=build --chown=0:0 /opt/keylake/venv /opt/keylake/venv
COPY --from=build --chown=0:0 /opt/keylake/app /opt/keylake/app
# Code is run from here, so shared/c_library.py insists that it belongs to whoever runs it.
COPY --from=build --chown=10001:10001 /opt/keylake/lib /opt/keylake/lib
ENV PATH=/opt/keylake/venv/bin:$PATH PYTHONPATH=/opt/keylake/app PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 HOME=/tmp
# shared/hardening.py says why. The keymanager has two more in docker-compose.yml.
ENV LD_BIND_NOW=1 GLIBC_TUNABLES=glibc.malloc.perturb=165
USER 10001:10001
WORKDIR /tmp
CMD ["keylake", "--help"]

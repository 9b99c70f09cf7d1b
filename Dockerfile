# syntax=docker/dockerfile:1
# One image, four commands: the API (default), `celery -A workers.app worker`, `keyslice receive`, `keyslice up`.
#   docker build -t keyslice .                       torch for the CPU
#   docker build -t keyslice:cuda --target cuda .    torch with CUDA's libraries, for the NVIDIA container toolkit
FROM python:3.11-slim AS source
WORKDIR /opt/keyslice
RUN python -m venv /opt/venv
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service service
COPY workers workers
COPY models models

FROM source AS build-cpu
RUN PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu \
    /opt/venv/bin/pip install --no-cache-dir -e '.[postgres]' -c constraints.txt

FROM source AS build-cuda
RUN /opt/venv/bin/pip install --no-cache-dir -e '.[postgres]' -c constraints.txt

# Runs as nobody in particular, writes below /data and /tmp alone, and needs no capability: docker-compose.yml takes the
# rest away.
FROM python:3.11-slim AS base
RUN useradd --create-home --uid 10001 keyslice && mkdir /data && chown keyslice /data
COPY migrations /opt/keyslice/migrations
ENV PATH=/opt/venv/bin:$PATH KEYSLICE_DATA_DIR=/data PYTHONUNBUFFERED=1
USER keyslice
WORKDIR /opt/keyslice
VOLUME /data
EXPOSE 8000
# Beyond loopback, so that the API refuses to start without a key.
ENV KEYSLICE_HOST=0.0.0.0
CMD ["keyslice", "serve"]

FROM base AS cuda
COPY --from=build-cuda /opt/venv /opt/venv
COPY --from=build-cuda /opt/keyslice /opt/keyslice

FROM base AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
COPY --from=build-cpu /opt/keyslice /opt/keyslice

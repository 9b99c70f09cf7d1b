# syntax=docker/dockerfile:1
# One image, three commands: the API (default), `celery -A workers.app worker`, `keyslice up`.
FROM python:3.11-slim AS build
WORKDIR /opt/keyslice
RUN python -m venv /opt/venv
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service service
COPY workers workers
COPY models models
RUN /opt/venv/bin/pip install --no-cache-dir -e '.[postgres]' -c constraints.txt

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 keyslice && mkdir /data && chown keyslice /data
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/keyslice /opt/keyslice
COPY migrations /opt/keyslice/migrations
ENV PATH=/opt/venv/bin:$PATH KEYSLICE_DATA_DIR=/data PYTHONUNBUFFERED=1
USER keyslice
WORKDIR /opt/keyslice
VOLUME /data
EXPOSE 8000
# Says what CMD does, so that the API refuses to start without a key.
ENV KEYSLICE_HOST=0.0.0.0
CMD ["uvicorn", "--factory", "service.app:create_app", "--host", "0.0.0.0", "--port", "8000", "--no-access-log", "--timeout-keep-alive", "75"]

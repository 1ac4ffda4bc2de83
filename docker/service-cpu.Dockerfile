# The service on a CPU: no torch, not root, nothing written but /tmp. Bundles are a volume at /bundles; without one the
# demo bundle answers.
#   docker build -f docker/service-cpu.Dockerfile -t limner-cpu .
#   docker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 limner-cpu
# The secrets are for networks with a package index or an authority of their own; both may be left out (docs/containers.md).
ARG BASE_IMAGE=python:3.12.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
WORKDIR /src
RUN python3 -m venv /opt/limner
COPY pyproject.toml README.md LICENSE limner.py ./
COPY service service
COPY models models
COPY training training
COPY export export
# Compiled here, since a read-only container cannot keep what it compiles; by hash, since layers need not keep times.
# pip itself stays behind: nothing is installed into a running service.
RUN --mount=type=secret,id=pip-conf,target=/etc/pip.conf --mount=type=secret,id=pip-cert,target=/run/secrets/pip-cert \
    if [ -s /run/secrets/pip-cert ]; then export PIP_CERT=/run/secrets/pip-cert; fi; \
    /opt/limner/bin/pip install --no-cache-dir --no-compile --disable-pip-version-check . \
    && /opt/limner/bin/pip uninstall --yes --quiet pip \
    && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/limner/lib

FROM ${BASE_IMAGE}
ARG BASE_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="limner" \
      org.opencontainers.image.description="R-CNN detectors over HTTP: boxes, exact masks, keypoints" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
COPY --from=build /opt/limner /opt/limner
COPY bundles /bundles
ENV PATH=/opt/limner/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    LIMNER_HOST=0.0.0.0 LIMNER_PORT=8000 LIMNER_BUNDLES=/bundles LIMNER_LOG_FORMAT=json
USER 65532:65532
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['LIMNER_PORT'] + '/readyz', timeout=2)"]
ENTRYPOINT ["limner"]
CMD ["serve"]

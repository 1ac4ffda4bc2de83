# The service on a CPU: no torch, not root, nothing written but /tmp. Bundles are a volume at /bundles.
#   docker build -f docker/service-cpu.Dockerfile -t limner-cpu .
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /src
RUN python3 -m venv /opt/limner
COPY pyproject.toml README.md LICENSE limner.py ./
COPY service service
COPY models models
COPY training training
COPY export export
RUN /opt/limner/bin/pip install --no-cache-dir --no-compile .

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="limner" \
      org.opencontainers.image.description="R-CNN detectors over HTTP: boxes, exact masks, keypoints" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/limner /opt/limner
COPY bundles /bundles
ENV PATH=/opt/limner/bin:$PATH PYTHONDONTWRITEBYTECODE=1 \
    LIMNER_HOST=0.0.0.0 LIMNER_PORT=8000 LIMNER_BUNDLES=/bundles LIMNER_LOG_FORMAT=json
USER 65532:65532
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["limner"]
CMD ["serve"]

# The tools: training, export, TensorRT plans. With torch, so large; it serves nothing and listens nowhere.
#   docker build -f docker/tools.Dockerfile -t limner-tools .
#   docker run --rm -v ./runs:/runs limner-tools export onnx /runs/mine/best --out /runs/bundles/mine/1
# torch's own wheels bring CUDA, so the base needs none. EXTRAS="train,export" leaves TensorRT out.
ARG BASE_IMAGE=python:3.12.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG EXTRAS=train,export,tensorrt
WORKDIR /src
RUN python3 -m venv /opt/limner
COPY pyproject.toml README.md LICENSE limner.py ./
COPY service service
COPY models models
COPY training training
COPY export export
RUN --mount=type=secret,id=pip-conf,target=/etc/pip.conf --mount=type=secret,id=pip-cert,target=/run/secrets/pip-cert \
    if [ -s /run/secrets/pip-cert ]; then export PIP_CERT=/run/secrets/pip-cert; fi; \
    /opt/limner/bin/pip install --no-cache-dir --no-compile --disable-pip-version-check ".[${EXTRAS}]" \
    && /opt/limner/bin/pip uninstall --yes --quiet pip

FROM ${BASE_IMAGE}
ARG BASE_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="limner-tools" \
      org.opencontainers.image.description="Training, export and TensorRT plans of limner's detectors" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
COPY --from=build /opt/limner /opt/limner
COPY bundles /bundles
# A new named volume takes the owner of the directory that it is mounted over.
RUN mkdir /plans /runs && chown 65532:65532 /plans /runs
ENV PATH=/opt/limner/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["limner"]
CMD ["--help"]

# The service on an NVIDIA GPU: CUDA 13, ONNX Runtime with CUDA, TensorRT; no torch. As the CPU image otherwise.
#   docker build -f docker/service-gpu.Dockerfile -t limner-gpu .
#   docker run --rm --gpus all --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 limner-gpu
# Needs the NVIDIA container toolkit and a driver for CUDA 13 on the host.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04

FROM ${BASE_IMAGE} AS python
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv ca-certificates \
    && rm -rf /var/lib/apt/lists/*

FROM python AS build
WORKDIR /src
RUN python3 -m venv /opt/limner
COPY pyproject.toml README.md LICENSE limner.py ./
COPY service service
COPY models models
COPY training training
COPY export export
# onnxruntime and onnxruntime-gpu are one package under two names: the first goes, then the second is laid down whole.
# OpenVINO goes too: it serves processors.
RUN --mount=type=secret,id=pip-conf,target=/etc/pip.conf --mount=type=secret,id=pip-cert,target=/run/secrets/pip-cert \
    if [ -s /run/secrets/pip-cert ]; then export PIP_CERT=/run/secrets/pip-cert; fi; \
    pip="/opt/limner/bin/pip --no-cache-dir --disable-pip-version-check" \
    && $pip install --no-compile '.[gpu]' \
    && $pip uninstall --yes --quiet onnxruntime openvino openvino-telemetry \
    && $pip install --no-compile --no-deps --force-reinstall onnxruntime-gpu \
    && $pip uninstall --yes --quiet pip \
    && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/limner/lib

FROM python
ARG BASE_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="limner-gpu" \
      org.opencontainers.image.description="R-CNN detectors over HTTP on an NVIDIA GPU: boxes, exact masks, keypoints" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
COPY --from=build /opt/limner /opt/limner
COPY bundles /bundles
# A new named volume takes the owner of the directory that it is mounted over: whoever builds plans here may write.
RUN mkdir /plans && chown 65532:65532 /plans
ENV PATH=/opt/limner/bin:/usr/local/nvidia/bin:/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    LIMNER_HOST=0.0.0.0 LIMNER_PORT=8000 LIMNER_BUNDLES=/bundles LIMNER_LOG_FORMAT=json
USER 65532:65532
WORKDIR /tmp
EXPOSE 8000
# Loading plans and warming take longer than on a CPU.
HEALTHCHECK --interval=10s --timeout=3s --start-period=180s \
    CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['LIMNER_PORT'] + '/readyz', timeout=2)"]
ENTRYPOINT ["limner"]
CMD ["serve"]

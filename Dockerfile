# syntax=docker/dockerfile:1
# One image for every stage. The first part compiles mmcv, the second runs; both on the same CUDA.
#   docker build -t rmoe .
#   docker build -t rmoe --build-arg BASE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04 \
#     --build-arg BUILD_BASE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04 .
ARG BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04
ARG BUILD_BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04

# hadolint ignore=DL3006
FROM ${BUILD_BASE} AS build
# What Debian and Ubuntu call Python 3.11 or 3.12; its exact version is the base's.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/rmoe/bin:$PATH
COPY constraints.txt /src/
WORKDIR /src
# The order is the Makefile's: torch first, then mmcv compiled against it, OpenCV last and headless.
RUN python3 -m venv /opt/rmoe \
 && pip install -c constraints.txt setuptools wheel ninja \
 && pip install -c constraints.txt torch torchvision
# Without a GPU in sight mmcv would be compiled for none.
ARG CUDA_ARCHITECTURES="8.0;9.0"
RUN if command -v nvcc; then export FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}"; fi \
 && MMCV_WITH_OPS=1 pip install -c constraints.txt --no-build-isolation onedl-mmcv
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY ds_configs ds_configs
COPY rmoe rmoe
RUN pip install -c constraints.txt . \
 && pip install -c constraints.txt --force-reinstall --no-deps opencv-python-headless \
 && python -c 'from mmcv.ops import RoIAlign, nms'

# hadolint ignore=DL3006
FROM ${BASE}
# Triton compiles what starts its kernels: without compiler and headers mixtures run slower on a GPU.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-dev gcc \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 rmoe
COPY --from=build /opt/rmoe /opt/rmoe
WORKDIR /rmoe
COPY ds_configs ds_configs
COPY launch launch
COPY rmoe/configs rmoe/configs
RUN mkdir work_dirs && chown rmoe work_dirs
ENV PATH=/opt/rmoe/bin:$PATH PYTHON=/opt/rmoe/bin/python PYTHONUNBUFFERED=1
USER 10001
CMD ["rmoe", "--help"]

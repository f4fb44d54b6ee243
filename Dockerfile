# Two images:
#
#   docker build --target server --tag ome-tensor .                     the server and its command line, without PyTorch
#   docker build --target client-torch --tag ome-tensor-client-torch .  the client for training nodes, with PyTorch
#
# Needs no BuildKit. (The classic builder makes every stage before the one it is asked for: name the target, or it makes both.)
#
#   --build-arg BASE_IMAGE=NAME    any Debian-like image with Python 3.11 to 3.13, venv and pip
#   --build-arg TORCH=2.13.0       PyTorch's version
#   --build-arg REVISION=COMMIT    for the image's label
#
# A build that cannot reach a package index: `python3 deploy/fetch_wheels.py 3.12` (the base image's Python) puts every wheel that it
# needs into wheels/ first; then add --build-arg PIP_NO_INDEX=1. A CPU build of PyTorch that lies in wheels/ is taken before the index's.
ARG BASE_IMAGE=python:3.12-slim

# --- what is installed, and by whom ---------------------------------------------------------------------------------------------

FROM ${BASE_IMAGE} AS build
# pip reads both from its environment; unset, they change nothing. Each stage has to ask for them.
ARG PIP_NO_INDEX
ARG PIP_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY wheels wheels/
COPY deploy/locks deploy/locks/
# Environments without pip of their own: they are filled from outside and hold only what runs.
RUN python3 -m venv --without-pip /opt/build \
    && python3 -m pip --python /opt/build/bin/python install --find-links wheels --require-hashes --requirement deploy/locks/build.txt

# Dependencies first, so that an edit of the source does not install them again.
FROM build AS server-dependencies
ARG PIP_NO_INDEX
ARG PIP_INDEX_URL
RUN python3 -m venv --without-pip /opt/ome-tensor \
    && python3 -m pip --python /opt/ome-tensor/bin/python install --find-links wheels --require-hashes --requirement deploy/locks/server.txt \
    # What is there to build and to test packages with.
    && rm -rf /opt/ome-tensor/lib/python3*/site-packages/pyarrow/include /opt/ome-tensor/lib/python3*/site-packages/pyarrow/tests

FROM build AS project
COPY pyproject.toml README.md LICENSE ./
COPY tensor tensor/
COPY proto proto/
COPY client client/
COPY server server/
RUN /opt/build/bin/hatchling build --target wheel --directory /dist

FROM server-dependencies AS server-environment
COPY --from=project /dist /dist
RUN python3 -m pip --python /opt/ome-tensor/bin/python install --no-index --no-deps /dist/*.whl

# --- what both images run in ------------------------------------------------------------------------------------------------------

FROM ${BASE_IMAGE} AS runtime
# A number of its own, fixed: mounted folders can be given to it, and Kubernetes can see that it is not root.
RUN groupadd --gid 10001 ome-tensor \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin ome-tensor
# glibc gives large blocks back to the kernel when they are freed, and then every message pays a page fault for each 4 KiB it
# allocates: more than the copy of its pixels. Keep blocks up to glibc's cap of 32 MiB, and the heap that holds them.
ENV PATH=/opt/ome-tensor/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MALLOC_MMAP_THRESHOLD_=33554432 \
    MALLOC_TRIM_THRESHOLD_=268435456 \
    MALLOC_TOP_PAD_=16777216
USER 10001:10001

# --- the server -----------------------------------------------------------------------------------------------------------------

FROM runtime AS server
USER root
# A named volume that is mounted there for the first time becomes what the image has there: its user's.
RUN install --directory --owner 10001 --group 10001 --mode 0750 /var/lib/ome-tensor /var/lib/ome-tensor/store /var/lib/ome-tensor/uploads
USER 10001:10001
COPY --from=server-environment /opt/ome-tensor /opt/ome-tensor
ENV \
    OME_TENSOR_LISTEN=0.0.0.0:50051 \
    OME_TENSOR_STORE=/var/lib/ome-tensor/store \
    OME_TENSOR_UPLOADS=/var/lib/ome-tensor/uploads
ARG VERSION=0.1.0
ARG REVISION=
# Fails where the label would say another version than the program.
RUN test "$(ome-tensor --version)" = "ome-tensor ${VERSION}"
LABEL org.opencontainers.image.title="ome-tensor" \
      org.opencontainers.image.description="Serves OME-Arrow images as lazy tensor views over gRPC" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="BSD-3-Clause"
VOLUME ["/data", "/var/lib/ome-tensor"]
# Calls, and metrics where OME_TENSOR_METRICS says so.
EXPOSE 50051 9464
# With TLS it needs OME_TENSOR_CLIENT_CA, and OME_TENSOR_CLIENT_SERVER_NAME where the certificate is not for 127.0.0.1.
HEALTHCHECK --interval=5s --timeout=20s --start-period=60s --retries=3 CMD ["ome-tensor", "health", "127.0.0.1:50051"]
# PID 1 has to pass signals on, and to bury processes that are left to it. The server ends its own: they are not told.
ENTRYPOINT ["dumb-init", "--single-child", "--", "ome-tensor"]
# It wants a certificate and tokens (docker-compose.yml brings both), or OME_TENSOR_INSECURE=true.
CMD ["serve", "/data"]

# --- the client, for training nodes ------------------------------------------------------------------------------------------------

FROM build AS client-environment
ARG PIP_NO_INDEX
ARG PIP_INDEX_URL
ARG TORCH=2.13.0
RUN python3 -m venv --without-pip /opt/ome-tensor \
    && python3 -m pip --python /opt/ome-tensor/bin/python install --find-links wheels --require-hashes --requirement deploy/locks/client-torch.txt \
    # PyTorch names the builds of what it needs for CUDA itself; a build for the CPU needs none of them.
    && python3 -m pip --python /opt/ome-tensor/bin/python install --find-links wheels "torch==${TORCH}" \
    && rm -rf /opt/ome-tensor/lib/python3*/site-packages/torch/include /opt/ome-tensor/lib/python3*/site-packages/torch/test \
              /opt/ome-tensor/lib/python3*/site-packages/pyarrow/include /opt/ome-tensor/lib/python3*/site-packages/pyarrow/tests
COPY --from=project /dist /dist
RUN python3 -m pip --python /opt/ome-tensor/bin/python install --no-index --no-deps /dist/*.whl

FROM runtime AS client-torch
COPY --from=client-environment /opt/ome-tensor /opt/ome-tensor
ARG VERSION=0.1.0
ARG REVISION=
RUN test "$(ome-tensor --version)" = "ome-tensor ${VERSION}"
LABEL org.opencontainers.image.title="ome-tensor client" \
      org.opencontainers.image.description="Reads OME-Arrow images from an ome-tensor server into PyTorch" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="BSD-3-Clause"
ENTRYPOINT ["dumb-init", "--"]
CMD ["ome-tensor", "--help"]

# What `docker build .` makes.
FROM server

# The ome-tensor server (and its command line) without PyTorch. Needs no BuildKit.
#
#   docker build --tag ome-tensor .
#   docker build --tag ome-tensor --build-arg BASE_IMAGE=NAME .      NAME: any Debian-like image with Python 3.11+, venv and pip
#
# A build that cannot reach a package index: `python3 deploy/fetch_wheels.py 3.12` (the base image's Python) puts every wheel it needs
# into wheels/ first; then add --build-arg PIP_NO_INDEX=1.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
# pip reads both from its environment; unset, they change nothing.
ARG PIP_NO_INDEX
ARG PIP_INDEX_URL
WORKDIR /src
# Without pip of its own: the environment is filled from outside and holds only what runs.
RUN python3 -m venv --without-pip /opt/ome-tensor
# Dependencies first, from the project's own list, so that an edit of the source does not install them again.
COPY pyproject.toml ./
COPY wheels wheels/
RUN python3 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], *project['optional-dependencies']['server'], sep='\n')" > /tmp/requirements.txt \
    && python3 -m pip --python /opt/ome-tensor/bin/python install --no-cache-dir --find-links wheels --requirement /tmp/requirements.txt
COPY . .
RUN python3 -m pip --python /opt/ome-tensor/bin/python install --no-cache-dir --find-links wheels --no-deps .

FROM ${BASE_IMAGE}
# A number of its own, fixed: mounted folders can be given to it, and Kubernetes can see that it is not root.
RUN groupadd --gid 10001 ome-tensor \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin ome-tensor
COPY --from=build /opt/ome-tensor /opt/ome-tensor
# glibc gives large blocks back to the kernel when they are freed, and then every message pays a page fault for each 4 KiB it
# allocates: more than the copy of its pixels. Keep blocks up to glibc's cap of 32 MiB, and the heap that holds them.
ENV PATH=/opt/ome-tensor/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MALLOC_MMAP_THRESHOLD_=33554432 \
    MALLOC_TRIM_THRESHOLD_=268435456 \
    MALLOC_TOP_PAD_=16777216
USER 10001:10001
VOLUME /data
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["ome-tensor", "health", "127.0.0.1:50051"]
ENTRYPOINT ["ome-tensor"]
# Plain text, since the image can bring no certificate: publish the port to networks you trust only.
CMD ["serve", "/data", "--listen", "0.0.0.0:50051", "--insecure"]

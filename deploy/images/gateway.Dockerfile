# The gateway. No torch.
#   docker build -f deploy/images/gateway.Dockerfile -t tinsmith-gateway:0.1.0 .
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN groupadd --gid 10001 tinsmith \
    && useradd --uid 10001 --gid tinsmith --no-create-home --home-dir /tmp tinsmith
WORKDIR /src
COPY constraints.txt ./
# What the project needs, without the project: a change of its code keeps this layer.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir -p client/tinsmith services/tinsmithd \
    && pip install --no-cache-dir -c constraints.txt '.[gateway]'
COPY client/tinsmith client/tinsmith
COPY services/tinsmithd services/tinsmithd
RUN pip install --no-cache-dir --no-deps --force-reinstall .

WORKDIR /
USER 10001:10001
ENTRYPOINT ["python", "-P", "-m", "tinsmithd.gateway"]

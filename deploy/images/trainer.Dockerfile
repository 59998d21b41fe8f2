# The ranks.
#   docker build -f deploy/images/trainer.Dockerfile -t tinsmith-trainer:0.1.0-cpu .
# TORCH_INDEX_URL picks the torch build (docs/deploy.md); empty takes pip's default index: CUDA.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN groupadd --gid 10001 tinsmith \
    && useradd --uid 10001 --gid tinsmith --no-create-home --home-dir /tmp tinsmith
WORKDIR /src
COPY constraints.txt ./
# The largest layer by far, made again only when a pinned version changes.
ARG TORCH_INDEX_URL=
RUN grep '^torch==' constraints.txt > torch.txt \
    && pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} -r torch.txt
# What the project needs, without the project: a change of its code keeps this layer.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir -p client/tinsmith services/tinsmithd \
    && pip install --no-cache-dir -c constraints.txt '.[server]'
COPY client/tinsmith client/tinsmith
COPY services/tinsmithd services/tinsmithd
RUN pip install --no-cache-dir --no-deps --force-reinstall .

WORKDIR /
USER 10001:10001
ENTRYPOINT ["python", "-P", "-m", "tinsmithd.trainer"]

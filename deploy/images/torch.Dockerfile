# What computes; --target is trainer (the ranks) or sampler:
#   docker build -f deploy/images/torch.Dockerfile --target sampler -t tinsmith-sampler:0.1.0-gpu .
# They share all layers but the Sampler's kernels, so a node keeps them once.
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
# The largest layer by far, made again only when a pinned version changes. TORCH_INDEX_URL picks the
# torch build; empty takes pip's own index, which has CUDA's. That of CPUs is
# https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX_URL=
RUN --mount=type=secret,id=ca grep '^torch==' constraints.txt > torch.txt \
    && pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} -r torch.txt
# What the project needs, without the project: a change of its code keeps this layer.
COPY pyproject.toml README.md LICENSE ./
RUN --mount=type=secret,id=ca mkdir -p client/tinsmith services/tinsmithd \
    && pip install --no-cache-dir -c constraints.txt '.[server,oidc,otel]'
COPY client/tinsmith client/tinsmith
COPY services/tinsmithd services/tinsmithd
RUN --mount=type=secret,id=ca pip install --no-cache-dir --no-deps --force-reinstall .

WORKDIR /

FROM installed AS trainer
USER 10001:10001
ENTRYPOINT ["python", "-P", "-m", "tinsmithd.trainer"]

# The kernels of all CPUs that they are for; elsewhere torch computes, and the folder is empty.
FROM installed AS kernels
# The compiler of this Debian, whichever it is: nothing of it but what it compiles goes on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN mkdir -p /opt/tinsmith/kernels \
    && if [ "$(uname -m)" = x86_64 ]; then \
         python -P -m tinsmithd.sampler.engines.transformers.native /opt/tinsmith/kernels; \
       fi \
    && chmod -R a+rX /opt/tinsmith

FROM installed AS sampler
COPY --from=kernels /opt/tinsmith /opt/tinsmith
ENV TINSMITH_SAMPLER_NATIVE_FOLDER=/opt/tinsmith/kernels
USER 10001:10001
ENTRYPOINT ["python", "-P", "-m", "tinsmithd.sampler"]

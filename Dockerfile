# Baton's images, one target each:
#
#   gateway      the OpenAI endpoint
#   kv-transfer  a node's block store
#   worker-sim   a prefill or decode worker with the sim engine
#   worker-cpu   a worker with vLLM for CPUs; worker-vllm is the same, for who chooses by BATON_ENGINE
#   worker-cuda  a worker with vLLM for NVIDIA GPUs
#
# Packages are those of requirements/*.lock, by hash and as wheels: nothing is compiled. They come from where pip.conf
# says, which is a build secret (`--secret id=pip.conf,src=…`), so that the address of a package index, or its password,
# stays out of the images. Containers run as user 10001 and need no file system that can be written to but /tmp.
FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# ---- what is installed, made apart: pip and its cache stay behind --------------------------------------------------
FROM base AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore PIP_ONLY_BINARY=:all:
WORKDIR /src
RUN python -m venv --without-pip /opt/venv

FROM build AS packages
COPY requirements/base.lock ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip --python /opt/venv install --no-deps --require-hashes -r base.lock

FROM build AS packages-cpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements/torch-cpu.lock ./
# The default index first: many mirrors have the CPU build, too.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip --python /opt/venv install --no-deps --require-hashes -r torch-cpu.lock || \
    pip --python /opt/venv install --no-deps --require-hashes --index-url "$TORCH_CPU_INDEX" -r torch-cpu.lock
COPY requirements/cpu.lock ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip --python /opt/venv install --no-deps --require-hashes -r cpu.lock

FROM build AS packages-cuda
COPY requirements/cuda.lock ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip --python /opt/venv install --no-deps --require-hashes -r cuda.lock

# Baton itself, in a layer of its own: a new version of it moves a few hundred kilobytes.
FROM build AS baton
COPY requirements/build.lock ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --require-hashes -r build.lock
COPY pyproject.toml README.md LICENSE ./
COPY services services
COPY shared shared
COPY loadtest loadtest
RUN pip wheel --no-deps --no-build-isolation --no-index --wheel-dir /wheels . \
    && pip --python /opt/venv install --no-deps --no-index --target /opt/baton /wheels/*.whl

# ---- what runs ------------------------------------------------------------------------------------------------------
FROM base AS service
# The folders are where volumes are mounted: a new volume takes their owner.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin baton \
    && for name in baton gateway prefill decode kv nats redis; do mkdir -p -m 0700 "/run/secrets/$name"; done \
    && mkdir -p /run/baton /data && chmod 0700 /run/baton /data \
    && chown -R baton:baton /run/baton /run/secrets/* /data
COPY models/demo /models/baton-demo
ENV PATH=/opt/venv/bin:/opt/baton/bin:$PATH PYTHONPATH=/opt/baton HOME=/tmp \
    BATON_MODEL=/models/baton-demo \
    BATON_PROBE_HOST=0.0.0.0 BATON_PROBE_PORT=9100 BATON_SHM_DIR=/run/baton BATON_KV_SOCKET=/run/baton/kv.sock
USER 10001:10001
HEALTHCHECK --interval=5s --timeout=4s --start-period=5m --retries=3 \
    CMD python -I -S /opt/baton/services/launcher/container_health.py "$BATON_PROBE_PORT"

FROM service AS service-slim
COPY --from=packages /opt/venv /opt/venv
COPY --from=baton /opt/baton /opt/baton

FROM service-slim AS gateway
ENV BATON_HOST=0.0.0.0 BATON_PORT=8000
EXPOSE 8000
CMD ["python", "-m", "services.gateway"]

FROM service-slim AS kv-transfer
CMD ["python", "-m", "services.kv_transfer"]

FROM service-slim AS worker-sim
ENV BATON_ENGINE=sim
CMD ["python", "-m", "services.decode_worker"]

FROM service AS worker-cpu
USER root
RUN apt-get update && apt-get install --yes --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=packages-cpu /opt/venv /opt/venv
COPY --from=baton /opt/baton /opt/baton
ENV VLLM_NO_USAGE_STATS=1
CMD ["python", "-m", "services.decode_worker"]

# The one image with a compiler: Triton, and so vLLM on a GPU, compiles the launchers of its kernels when it starts.
FROM service AS worker-cuda
USER root
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=packages-cuda /opt/venv /opt/venv
COPY --from=baton /opt/baton /opt/baton
ENV VLLM_NO_USAGE_STATS=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["python", "-m", "services.decode_worker"]

FROM worker-cpu AS worker-vllm

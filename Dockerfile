# One image for each service, each with what that service needs and no more; see docs/deploy.md.
# BASE_IMAGE must be Debian-like, with Python 3.11 or later and its venv module; the images of CUDA must be Debian-like, with
# Python 3.11 or later to be had from their distribution: the first with a toolkit, the second with its libraries.
ARG BASE_IMAGE=python:3.11-slim-bookworm
ARG CUDA_BUILD_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04

FROM ${BASE_IMAGE} AS wheel
RUN python3 -m venv /build && /build/bin/pip install --no-cache-dir --upgrade 'pip>=25.1'
WORKDIR /source
COPY pyproject.toml README.md LICENSE hatch_build.py generate_protos.py ./
COPY protos protos
COPY models/demo-gpt-oss.gguf models/demo-gpt2.gguf models/
COPY mxgpt mxgpt
COPY services services
COPY shared shared
RUN /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM wheel AS loader-environment
RUN python3 -m venv /opt/mxgpt && /build/bin/pip --python /opt/mxgpt install --no-cache-dir --group loader \
    && /build/bin/pip --python /opt/mxgpt install --no-cache-dir --no-deps /wheels/*.whl

FROM wheel AS tokenizer-environment
RUN python3 -m venv /opt/mxgpt && /build/bin/pip --python /opt/mxgpt install --no-cache-dir --group tokenizer \
    && /build/bin/pip --python /opt/mxgpt install --no-cache-dir --no-deps /wheels/*.whl

FROM wheel AS executor-environment
RUN python3 -m venv /opt/mxgpt && /build/bin/pip --python /opt/mxgpt install --no-cache-dir --group executor \
    && /build/bin/pip --python /opt/mxgpt install --no-cache-dir --no-deps /wheels/*.whl

# Every service runs as the same user, who owns the directory of the descriptors' sockets; a new volume takes it over.
FROM ${BASE_IMAGE} AS runtime
RUN useradd --system --uid 10001 --no-create-home mxgpt && install -d -o mxgpt -m 700 /run/mxgpt
ENV PATH=/opt/mxgpt/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER mxgpt
WORKDIR /tmp

FROM runtime AS loader
COPY --from=loader-environment /opt/mxgpt /opt/mxgpt
EXPOSE 50053
# Replicas share a volume, each has a socket of its own in it.
ENTRYPOINT ["/bin/sh", "-c", "exec python -m services.loader --socket \"/run/mxgpt/$(hostname).sock\" \"$@\"", "loader"]
CMD ["--listen", "0.0.0.0:50053", "--allow-insecure", "--metrics", "0.0.0.0:9460", "--model", "/opt/mxgpt/share/mxgpt/models/demo-gpt-oss.gguf"]

FROM runtime AS tokenizer
COPY --from=tokenizer-environment /opt/mxgpt /opt/mxgpt
EXPOSE 50052
ENTRYPOINT ["python", "-m", "services.tokenizer"]
CMD ["--listen", "0.0.0.0:50052", "--allow-insecure", "--metrics", "0.0.0.0:9460", "--loader", "loader:50053"]

FROM runtime AS executor
COPY --from=executor-environment /opt/mxgpt /opt/mxgpt
EXPOSE 50051
ENTRYPOINT ["python", "-m", "services.executor"]
CMD ["--listen", "0.0.0.0:50051", "--allow-insecure", "--metrics", "0.0.0.0:9460", "--loader", "loader:50053", \
     "--tokenizer", "tokenizer:50052"]

# HAProxy: one published endpoint over every executor, found by name as they come and go.
FROM ${BASE_IMAGE} AS gateway
RUN apt-get update && apt-get install -y --no-install-recommends haproxy && rm -rf /var/lib/apt/lists/*
COPY deploy/haproxy.cfg /etc/haproxy/haproxy.cfg
ENV MXGPT_EXECUTORS=executor:50051
EXPOSE 50051
USER haproxy
ENTRYPOINT ["haproxy", "-W", "-db", "-f", "/etc/haproxy/haproxy.cfg"]

# For a GPU (docker compose --profile cuda), on NVIDIA's images. Kept last: a builder without BuildKit builds all that comes
# before its target, and these need large images that nothing above does.
FROM ${CUDA_BUILD_IMAGE} AS cuda-build
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends build-essential python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
# PyCUDA is linked with the driver's library, which no image has: the toolkit's stub stands in for it.
ENV PATH=/usr/local/cuda/bin:$PATH CUDA_HOME=/usr/local/cuda LIBRARY_PATH=/usr/local/cuda/lib64/stubs
RUN python3 -m venv /build && /build/bin/pip install --no-cache-dir --upgrade 'pip>=25.1'
WORKDIR /source
COPY pyproject.toml ./
COPY --from=wheel /wheels /wheels

FROM cuda-build AS loader-cuda-environment
RUN python3 -m venv /opt/mxgpt && /build/bin/pip --python /opt/mxgpt install --no-cache-dir --group loader-cuda \
    && /build/bin/pip --python /opt/mxgpt install --no-cache-dir --no-deps /wheels/*.whl

FROM cuda-build AS executor-cuda-environment
RUN python3 -m venv /opt/mxgpt && /build/bin/pip --python /opt/mxgpt install --no-cache-dir --group executor-cuda \
    && /build/bin/pip --python /opt/mxgpt install --no-cache-dir --no-deps /wheels/*.whl

# Compiled kernels are kept in /var/cache/mxgpt/cubins, which loaders and executors share as a volume.
FROM ${CUDA_IMAGE} AS cuda-runtime
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --no-create-home mxgpt && install -d -o mxgpt -m 700 /run/mxgpt /var/cache/mxgpt
ENV PATH=/opt/mxgpt/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 XDG_CACHE_HOME=/var/cache
USER mxgpt
WORKDIR /tmp

FROM cuda-runtime AS loader-cuda
COPY --from=loader-cuda-environment /opt/mxgpt /opt/mxgpt
EXPOSE 50053
ENTRYPOINT ["/bin/sh", "-c", "exec python -m services.loader --socket \"/run/mxgpt/$(hostname).sock\" \"$@\"", "loader"]
CMD ["--listen", "0.0.0.0:50053", "--allow-insecure", "--metrics", "0.0.0.0:9460", "--device", "cuda:0", \
     "--model", "/opt/mxgpt/share/mxgpt/models/demo-gpt-oss.gguf"]

FROM cuda-runtime AS executor-cuda
COPY --from=executor-cuda-environment /opt/mxgpt /opt/mxgpt
EXPOSE 50051
ENTRYPOINT ["python", "-m", "services.executor"]
CMD ["--listen", "0.0.0.0:50051", "--allow-insecure", "--metrics", "0.0.0.0:9460", "--device", "cuda:0", \
     "--loader", "loader-cuda:50053", "--tokenizer", "tokenizer-cuda:50052"]

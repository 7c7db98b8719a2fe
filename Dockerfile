# HAE-JAX with its shipped weights. Nothing is downloaded when it runs.
#   docker build -t hae-jax .                                  # CPU
#   docker build -t hae-jax:cuda --build-arg ACCELERATOR=cuda13 .  # NVIDIA
#   docker run --rm --network none -v "$PWD:/work" --user "$(id -u):$(id -g)" hae-jax hae-translate
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY hae_jax hae_jax
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:${PYTHON}-slim
ARG ACCELERATOR=
COPY requirements.txt /tmp/requirements.txt
RUN pip install --no-cache-dir -r /tmp/requirements.txt \
    && if [ -n "${ACCELERATOR}" ]; then \
         pip install --no-cache-dir "jax[${ACCELERATOR}]==$(python -c 'import importlib.metadata as m; print(m.version("jax"))')"; \
       fi
COPY --from=wheel /wheel /tmp/wheel
RUN pip install --no-cache-dir --no-deps /tmp/wheel/*.whl \
    && useradd --create-home --uid 1000 hae \
    && mkdir /work \
    && chown hae /work
# Any --user can run it: caches go where everybody may write.
ENV HOME=/tmp MPLBACKEND=Agg MPLCONFIGDIR=/tmp/matplotlib PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work
CMD ["hae-translate", "--help"]

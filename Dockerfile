# Nobody has built this yet. CPU:  docker build -t posttrain .
# CUDA:  docker build --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 --build-arg TORCH_INDEX= -t posttrain .
ARG BASE=ubuntu:24.04
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/posttrain
ENV PATH=/opt/posttrain/bin:$PATH
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url $TORCH_INDEX} torch
COPY src src
RUN pip install --no-cache-dir -c constraints.txt '.[watch,math,json]'
WORKDIR /runs
RUN useradd --create-home trainer && chown trainer /runs
USER trainer
ENTRYPOINT ["posttrain"]

# OWL for CPUs and NVIDIA GPUs: PyTorch's package brings CUDA's libraries, the host its driver. docs/how-to/container.md
FROM python:3.11-slim

# g++ compiles for torch.compile, libopenal1 plays the game's sound, ffmpeg converts footage, git names commits
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ffmpeg g++ git libopenal1 \
    && rm -rf /var/lib/apt/lists/*

# Packages first, for an empty owl: a change of the code leaves this layer as it is.
WORKDIR /owl
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN mkdir owl && touch owl/__init__.py \
    && pip install --no-cache-dir --constraint constraints.txt --editable '.[audio,depth,diffusers,fp8,game,onnx,s3]'

COPY owl owl
COPY configs configs
COPY experiments experiments

ENTRYPOINT ["python", "-m", "owl"]

# Training on NVIDIA GPUs; torch's wheels bring CUDA. Never built where it was written: there was neither Docker nor a GPU.
FROM python:3.11-slim
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /src
COPY . .
# A compiler, for torch.compile.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/* \
 && pip install ".[app,metrics,onnx,openmoji]" && mkdir /studio
WORKDIR /studio
# One process on each GPU.
ENTRYPOINT ["accelerate", "launch", "-m", "sfumato"]
CMD ["--help"]

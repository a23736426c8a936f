# The command `sfumato` and the app, on a CPU. Never built where it was written, for there was no Docker.
FROM python:3.11-slim
# PyTorch's own index of wheels for CPUs; without it gigabytes of CUDA come along.
ARG TORCH_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /src
COPY . .
RUN pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch>=2.11" \
 && pip install ".[app,metrics,onnx,openmoji]" \
 && useradd --create-home artist && mkdir /studio && chown artist /studio
USER artist
WORKDIR /studio
EXPOSE 7860
ENTRYPOINT ["sfumato"]
# Others than this container can connect only with the password in SFUMATO_PASSWORD.
CMD ["app", "--host", "0.0.0.0"]

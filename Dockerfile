# The HTTP service with the weights that come with the package: docs/serve.md.
#     docker build -t ghost-resnet . && docker run -p 8080:8080 ghost-resnet
FROM python:3.12-slim

# PyTorch without CUDA, which is a tenth of the size; for a GPU take the default index
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu

COPY pyproject.toml README.md LICENSE /src/
COPY ghost_resnet /src/ghost_resnet
RUN pip install --no-cache-dir "/src[serve]" && rm -r /src

RUN useradd --create-home --uid 1000 service
USER service
ENV HF_HUB_OFFLINE=1 MPLCONFIGDIR=/tmp
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=2)"]
ENTRYPOINT ["ghost-resnet", "serve", "--host", "0.0.0.0", "--port", "8080"]

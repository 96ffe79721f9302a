# The broker in a container. It needs no CUDA: NVML comes from the driver, with `--gpus all`.
#   docker build -t mgpumanager .
#   docker run --gpus all --pid host -p 127.0.0.1:8770:8770 \
#     -v ./consumers.yaml:/etc/gpumanager/consumers.yaml:ro mgpumanager
# --pid host lets it see whose memory it is; without, it goes by totals.
FROM python:3.12-slim AS build
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --wheel-dir /wheels .

FROM python:3.12-slim
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --no-index --find-links /wheels mgpumanager \
 && rm -rf /wheels \
 && useradd --uid 10001 --create-home --home-dir /var/lib/gpumanager gpumanager
USER gpumanager
ENV GPUMANAGER_CONFIG=/etc/gpumanager/consumers.yaml \
    XDG_STATE_HOME=/var/lib \
    PYTHONUNBUFFERED=1
EXPOSE 8770
VOLUME /var/lib/gpumanager
# SIGTERM drains; give `docker stop` a little more than drain_timeout.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8770/healthz', timeout=2)"]
ENTRYPOINT ["gpumanager"]
CMD ["serve"]

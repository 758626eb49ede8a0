# docker build -t pave-lightning . && docker run --rm --user "$(id -u)" -v "$PWD:/work" pave-lightning quickstart
FROM python:3.11-slim

WORKDIR /package
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch
COPY pyproject.toml setup.py README.md LICENSE ./
COPY pave_lightning pave_lightning
COPY recipes recipes
RUN pip install --no-cache-dir -c constraints.txt ".[quickstart]"

# Any user may be given; libraries keep their caches where each can write.
ENV HOME=/tmp
USER 1000
WORKDIR /work
ENTRYPOINT ["pave"]
CMD ["--help"]

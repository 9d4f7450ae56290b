# docker build -t uss . && docker run --rm -v "$PWD:/work" uss song.wav --class dog -n data/separators/bandsplit
FROM python:3.12-slim
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir --require-hashes -r requirements.txt
COPY pipeline pipeline
ENV PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1
WORKDIR /work
ENTRYPOINT ["python", "-m", "pipeline", "separate"]

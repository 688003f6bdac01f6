# syntax=docker/dockerfile:1

# One image with the programs garenne (and garenne-lab, which it becomes), garenne-worker and garenne-collector.

# The version of rust-toolchain.toml, so that no other toolchain is fetched during the build.
FROM rust:1.95.0-slim-bookworm AS build
# It also brings the C compiler that bundled SQLite needs.
WORKDIR /src
COPY . .
# The image brings this very toolchain; rust-toolchain.toml would ask for clippy and rustfmt too.
ENV RUSTUP_TOOLCHAIN=1.95.0
# The caches stay out of the image, and so does target/: hence the copy in the same step.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bins -p garenne-cli -p garenne-lab -p garenne-worker -p garenne-collector \
    && install -D -t /out target/release/garenne target/release/garenne-lab target/release/garenne-lab-worker \
       target/release/garenne-worker target/release/garenne-collector

FROM debian:bookworm-slim
# Certificates for amqps:// brokers.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/garenne --create-home --shell /usr/sbin/nologin garenne
COPY --from=build /out/ /usr/local/bin/
USER garenne
# A named volume that is mounted here takes over the owner. No VOLUME line: each worker would
# get an anonymous one that nobody removes.
WORKDIR /var/lib/garenne
CMD ["garenne", "--help"]

# syntax=docker/dockerfile:1

# One image with garenne, garenne-lab (which garenne runs for demo, bench and verify), garenne-worker
# and garenne-collector.

# The version of rust-toolchain.toml, so that no other toolchain is downloaded during the build. The
# image includes the C compiler that the bundled SQLite needs.
FROM rust:1.95.0-slim-bookworm AS build
WORKDIR /src
COPY . .
# Overrides rust-toolchain.toml, which also requests clippy and rustfmt.
ENV RUSTUP_TOOLCHAIN=1.95.0
# The cache mounts are not part of the image, target/ included, so the programs are copied in the same
# step.
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
# A named volume mounted here inherits the owner. There is no VOLUME instruction, since every worker
# would get an anonymous volume that is never removed.
WORKDIR /var/lib/garenne
CMD ["garenne", "--help"]

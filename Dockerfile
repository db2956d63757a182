# syntax=docker/dockerfile:1
# The image of both services and every command. Built with cached dependencies (cargo-chef), run without a shell and
# without root:
#
#   docker build -t oncegate:0.1.0 --build-arg REVISION="$(git rev-parse HEAD)" .
#   docker run --rm --stop-timeout 280 -p 127.0.0.1:8080:8080 -e DATABASE_URL -e UPSTREAM_URL -e STRIPE_WEBHOOK_SECRET \
#       -e GATEWAY_LISTEN=0.0.0.0:8080 oncegate:0.1.0 all
#
# Without --stop-timeout the engine kills after 10 s: docs/operations.md has the numbers.

# By tag, and not by digest: the registries are not at hand where this is maintained. Pin both where you build; what a tag
# means now is said by `docker buildx imagetools inspect NAME`:
#
#   --build-arg RUST=rust:1.95-slim-bookworm@sha256:... --build-arg BASE=gcr.io/distroless/cc-debian12:nonroot@sha256:...
ARG RUST=rust:1.95-slim-bookworm
ARG BASE=gcr.io/distroless/cc-debian12:nonroot

FROM ${RUST} AS chef
# The C compiler is for SQLite and the TLS library; there is no protoc to install.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev cmake make \
    && rm -rf /var/lib/apt/lists/* \
    && cargo install cargo-chef --locked --version 0.1.78
WORKDIR /build

FROM chef AS plan
COPY . .
RUN cargo chef prepare --recipe-path recipe.json

FROM chef AS build
# Only a changed Cargo.lock or Cargo.toml builds the dependencies anew.
COPY --from=plan /build/recipe.json recipe.json
COPY profile profile
COPY scripts/dist-flags scripts/dist-flags
# With the flags that the build below has, or that would compile them again.
RUN RUSTFLAGS=" $(scripts/dist-flags)" cargo chef cook --profile dist --locked --package oncegate-cli --recipe-path recipe.json
COPY . .
RUN scripts/dist --locked \
    && strip --strip-debug target/dist/oncegate \
    && install -d -o 65532 -g 65532 /var/lib/oncegate

# glibc, CA certificates, time zones, the user `nonroot` (65532), and nothing else.
FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Oncegate" \
      org.opencontainers.image.description="Payment webhooks, each event processed once" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /build/target/dist/oncegate /usr/bin/oncegate
# Where the embedded store is, when no database is given: mount a volume there.
COPY --from=build --chown=65532:65532 /var/lib/oncegate /var/lib/oncegate
WORKDIR /var/lib/oncegate
USER 65532:65532
# The admin listener is where the health command asks, whichever service this is.
ENV ONCEGATE_LOG_FORMAT=json \
    ADMIN_LISTEN=127.0.0.1:9090
# gRPC, webhooks, probes and metrics. Listeners are on loopback until a setting says otherwise.
EXPOSE 50051 8080 9090
# Kubernetes has probes of its own; this is for a plain engine.
HEALTHCHECK --interval=10s --timeout=6s --start-period=10s CMD ["/usr/bin/oncegate", "health", "--admin"]
ENTRYPOINT ["/usr/bin/oncegate"]
CMD ["--help"]

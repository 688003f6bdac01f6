# The commands of this repository. `make` alone lists them.
# Arguments for the program behind a command: make demo ARGS="--broadcast"

ARGS ?=
CARGO ?= cargo
# Wherever cargo builds: CARGO_TARGET_DIR, build.target-dir or target/. Asked only by who needs it.
TARGET = $(or $(shell $(CARGO) metadata --format-version 1 --no-deps | \
	sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p'),$(error cargo does not say where it builds))
FAILPOINTS = --workspace --features garenne-common/failpoints,garenne-worker/failpoints,garenne-collector/failpoints --target-dir $(TARGET)/failpoints

.DEFAULT_GOAL := help
.PHONY: help demo test test-failpoints test-guards test-cluster soak ci fmt fmt-check clippy doc deny bench bench-beside microbench verify

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## the demo, on a private RabbitMQ with management UI (or on AMQP_URL)
	scripts/setup --no-tests
	$(CARGO) build --profile demo --bin garenne --bin garenne-lab --bin garenne-worker --bin garenne-collector
	scripts/rabbitmq run --management -- $(TARGET)/demo/garenne demo $(ARGS)

# Tests mostly wait for brokers and processes, so more of them than cores run at once.
# The tests start the real binaries and the examples, so these are built first.
test: ## all tests, on a private RabbitMQ (or on AMQP_URL)
	scripts/setup
	$(CARGO) build --workspace --bins --examples
	CARGO="$(CARGO)" RUST_TEST_THREADS=$${RUST_TEST_THREADS:-4} \
		scripts/rabbitmq run -- scripts/run-tests --workspace $(ARGS)

# In a directory of its own, so that a program with failpoints is never taken for another.
test-failpoints: ## the tests of the tests: each protection disabled in turn (ARGS=EpochCheck,Isolation for some)
	scripts/setup
	$(CARGO) build $(FAILPOINTS) --bins
	GARENNE_TESTS_FAILPOINTS=$(ARGS) scripts/rabbitmq run -- $(CARGO) test $(FAILPOINTS) --test garenne -- \
		--exact failpoints::every_protection_is_missed_by_a_test --ignored --nocapture

test-guards: test-failpoints

# With release builds, because their figures are what they are for. ARGS picks some: ARGS=soak::delays
soak: ## the large runs behind the figures of the documentation (an hour or so)
	scripts/setup
	$(CARGO) build --release --bins
	scripts/rabbitmq run -- $(CARGO) test --release -p garenne-tests --features soak -- \
		--test-threads=1 --nocapture $(or $(ARGS),soak::)

test-cluster: ## a three-node cluster that loses nodes (needs user namespaces or root, and iptables)
	scripts/setup
	$(CARGO) build --workspace --bins --examples
	RUST_TEST_THREADS=1 scripts/rabbitmq-cluster run -- \
		$(CARGO) test -p garenne-tests --features cluster -- cluster:: --nocapture $(ARGS)

# One after the other, whatever -j says: each of them uses all cores, and the cheap ones fail first.
ci: ## what continuous integration runs: formatting, clippy, documentation, tests
	scripts/setup
	$(MAKE) fmt-check
	$(MAKE) clippy
	$(MAKE) doc
	$(MAKE) test

fmt: ## format the code
	$(CARGO) fmt --all

fmt-check: ## is the code formatted?
	$(CARGO) fmt --all --check

clippy: ## lints, warnings are errors
	$(CARGO) clippy --workspace --all-targets -- -D warnings

doc: ## the API documentation, warnings are errors
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps

deny: ## licences, advisories and sources of all dependencies (needs cargo-deny and a network)
	@$(CARGO) deny --version >/dev/null 2>&1 || \
		{ echo "cargo-deny is missing; install it with: cargo install cargo-deny --locked" >&2; exit 1; }
	$(CARGO) deny --all-features check

# A backlog of a million tasks is nothing to raise an alarm about; the node's own limits are for tests.
bench: export RABBITMQ_MEMORY ?= 6GB
bench: ## throughput, latency and memory beside a bare client, on a private RabbitMQ (or on AMQP_URL)
	scripts/setup --no-tests
	$(CARGO) build --release --bins
	scripts/rabbitmq run -- $(TARGET)/release/garenne bench $(ARGS)

bench-beside: ## is this build as fast as that of COMMIT? both take turns, RUNS=5 each (ARGS for the bench)
	@test -n "$(COMMIT)" || { echo "which commit? make bench-beside COMMIT=..." >&2; exit 2; }
	scripts/setup --no-tests
	CARGO="$(CARGO)" RUNS=$(or $(RUNS),5) scripts/bench-beside $(COMMIT) $(ARGS)

# No broker. What follows `--` is criterion's: ARGS="-p garenne-common -- reports"
microbench: ## criterion benchmarks of codec, settling and store (ARGS picks some)
	$(CARGO) bench --bench '*' $(or $(ARGS),-p garenne-common -p garenne-worker -p garenne-collector)

verify: ## tasks under faults, and a certificate, on a private RabbitMQ (or on AMQP_URL)
	scripts/setup --no-tests
	$(CARGO) build --release --bins
	scripts/rabbitmq run -- $(TARGET)/release/garenne verify $(ARGS)

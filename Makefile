# kmsd needs Go 1.26, make and git to build. "make" alone lists the targets.

GO            ?= go
VERSION       ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
FUZZTIME      ?= 30s
TESTFLAGS     ?=
BIN           ?= bin

# The release build: keys on the stack are erased (runtimesecret), freed heap is overwritten (clobberfree). Certificates with
# negative serial numbers, which MOSIP issued, are read anyway (client/pkix); x509negativeserial is for what parses some without it.
# godebugDefault set here replaces what go.mod would say.
export GOEXPERIMENT = runtimesecret
LDFLAGS = -s -w -X runtime.godebugDefault=clobberfree=1,x509negativeserial=1 -X main.version=$(VERSION)

STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK = golang.org/x/vuln/cmd/govulncheck@v1.9.0

# What the tests use besides Go. The race detector and the PKCS #11 helper: a C compiler. The outside judges: OpenSSL with its TPM
# provider, OpenSC, secret-tool, Python for the example client, Java with BouncyCastle for the formats of MOSIP. The devices, which the tests start themselves and end again: a software
# TPM, SoftHSM, a private session bus with the GNOME keyring, media of ext4 files. A second user: setpriv (util-linux). The units: systemd's own checker.
PACKAGES = gcc libc6-dev openssl python3 util-linux git ca-certificates swtpm swtpm-tools tpm2-openssl softhsm2 opensc opensc-pkcs11 \
           dbus-daemon gnome-keyring libsecret-tools keyutils e2fsprogs mount systemd default-jdk-headless libbcprov-java libbcpkix-java
TOOLS    = gcc openssl python3 setpriv git swtpm swtpm_setup softhsm2-util pkcs11-tool dbus-daemon gnome-keyring-daemon secret-tool \
           keyctl mount findmnt systemd-analyze systemd-socket-activate javac
MODULES  = ossl-modules/tpm2.so softhsm/libsofthsm2.so opensc-pkcs11.so
JARS     = bcprov.jar bcpkix.jar bcutil.jar

# Where "make install" puts things; see packaging/install for the rest.
DESTDIR    ?=
PREFIX     ?= /usr/local
SYSCONFDIR ?= /etc
export BIN DESTDIR PREFIX SYSCONFDIR BINDIR LIBEXECDIR UNITDIR USERUNITDIR SYSUSERSDIR TMPFILESDIR DATADIR

.PHONY: help build install uninstall demo test test-packages list-packages check vuln fuzz bench migration man clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## bin/kmsd, bin/kmsctl, bin/kmsd-keyring, and bin/kmsd-pkcs11 where there is a C compiler
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)' -o $(BIN)/ ./kmsd ./kmsctl ./enclave/keyring/kmsd-keyring
	@if echo '#include <stdlib.h>' | $$($(GO) env CC) -x c -c -o /dev/null - 2>/dev/null; then \
		set -x; CGO_ENABLED=1 $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)' -o $(BIN)/ ./enclave/pkcs11/kmsd-pkcs11; \
	else \
		rm -f $(BIN)/kmsd-pkcs11; echo "There is no C compiler: without kmsd-pkcs11 kmsd works with everything but PKCS #11 modules."; \
	fi
	@touch $(BIN)/.built

# Builds only what is missing or older than its sources, and never behind the back of somebody who typed sudo: what is in bin and in the
# caches of Go then belonged to root.
install: ## install below DESTDIR and PREFIX (/usr/local); starts nothing
	@if test ! -e $(BIN)/.built || find go.mod go.sum */ -name '*.go' ! -name '*_test.go' -newer $(BIN)/.built | grep -q .; then \
		if test "$$(id -u)" = 0 && test -n "$$SUDO_USER"; then \
			echo "bin is missing or older than the sources: type \"make build\" first, without sudo." >&2; exit 1; \
		fi; \
		$(MAKE) build; \
	fi
	@packaging/install install

uninstall: ## remove what install put there; never a keystore, nor a configuration that was changed
	@packaging/install uninstall

demo: build ## sign, encrypt and decrypt a registration packet through a private kmsd
	@CGO_ENABLED=0 $(GO) run ./docs/examples/demo -bin $(BIN)

# Twice, because the race detector makes the long loops too slow: they run in full without it (all bit flips, kills, vectors
# and key sizes, bounds of memory and of allocations), and shortened with it.
test: test-packages ## go vet, all tests, and a shorter run with the race detector
	$(GO) vet ./...
	$(GO) test -timeout 20m $(TESTFLAGS) ./...
	$(GO) test -race -short -timeout 20m $(TESTFLAGS) ./...

# Installs what the tests need where that is allowed, else says what to type.
test-packages:
	@missing=; PATH="$$PATH:/usr/sbin:/sbin"; \
	for tool in $(TOOLS); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	for file in $(MODULES); do ls /usr/lib*/*/$$file /usr/lib*/$$file 2>/dev/null | grep -q . || missing="$$missing $${file##*/}"; done; \
	for file in $(JARS); do test -e /usr/share/java/$$file || missing="$$missing $$file"; done; \
	echo '#include <stdlib.h>' | gcc -x c -c -o /dev/null - 2>/dev/null || missing="$$missing libc6-dev"; \
	test -z "$$missing" && exit 0; \
	if test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $(PACKAGES); \
	else \
		echo "The tests need:$$missing. Type:"; echo "sudo apt-get install --no-install-recommends $(PACKAGES)"; exit 1; \
	fi

list-packages:
	@echo $(PACKAGES)

check: ## gofmt, vet (client and keyring library for macOS and Windows too), staticcheck
	@unformatted=$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go')); \
	test -z "$$unformatted" || { echo "gofmt would change:"; echo "$$unformatted"; exit 1; }
	$(GO) vet ./...
	CGO_ENABLED=0 GOOS=darwin $(GO) vet ./client/... ./enclave/keyring/ring
	CGO_ENABLED=0 GOOS=windows $(GO) vet ./client/... ./enclave/keyring/ring
	$(GO) run $(STATICCHECK) ./...

vuln: ## known vulnerabilities in what is linked (asks vuln.go.dev)
	$(GO) run $(GOVULNCHECK) ./...

# The program of each package is built once, with the instrumentation of -fuzz, and then run for each of its targets.
fuzz: ## every fuzz target for FUZZTIME (default 30s; 1000x is a number of inputs)
	@set -e; program=$$(mktemp); trap 'rm -f $$program' EXIT; cache=$$($(GO) env GOCACHE)/fuzz; \
	for package in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -n1 dirname | sort -u); do \
		$(GO) test -c -fuzz . -o $$program $$package; \
		for target in $$(cd $$package && $$program -test.list '^Fuzz' | grep '^Fuzz'); do \
			echo "$$package $$target"; \
			(cd $$package && $$program -test.run '^$$' -test.fuzz "^$$target\$$" -test.fuzztime $(FUZZTIME) \
				-test.fuzzminimizetime 20x -test.fuzzcachedir "$$cache/$$(cd $(CURDIR) && $(GO) list $$package)"); \
		done; \
	done

bench: build ## measure the bars of docs/benchmarks.md
	$(GO) test ./kmsd/bench -run '^TestBars$$' -count=1 -timeout 60m -v -bars

migration: build ## import a made-up deployment of MOSIP with KEYS base keys (default 10000), and measure
	@dir=$$(mktemp -d); trap 'rm -rf $$dir' EXIT; CGO_ENABLED=0 $(GO) build -o $$dir/generate ./kmsctl/mosipdb/mosipdbtest/generate && \
		BIN=$(BIN):$$dir KEYS=$(or $(KEYS),10000) kmsctl/testdata/migration.sh

man: ## write packaging/man and packaging/completions again
	$(GO) test ./kmsctl -run '^TestPackaging$$' -count=1 -update

clean: ## remove bin
	rm -rf bin

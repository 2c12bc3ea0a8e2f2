# kmsd needs Go 1.26, make and git to build. "make" alone lists the targets.

GO            ?= go
VERSION       ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
FUZZTIME      ?= 30s
TESTFLAGS     ?=

# The release build: keys on the stack are erased (runtimesecret), freed heap is overwritten (clobberfree), certificates
# with negative serial numbers, which MOSIP issued, can be read (x509negativeserial). godebugDefault set here replaces
# what go.mod would say.
export GOEXPERIMENT = runtimesecret
LDFLAGS = -s -w -X runtime.godebugDefault=clobberfree=1,x509negativeserial=1 -X main.version=$(VERSION)

STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK = golang.org/x/vuln/cmd/govulncheck@v1.9.0

# What the tests use besides Go: a C compiler for the race detector, OpenSSL as the outside judge, Python for the example
# client, setpriv (util-linux) for a second user, a software TPM and the provider with which OpenSSL uses one, a software
# PKCS#11 token.
PACKAGES = gcc libc6-dev openssl python3 util-linux git ca-certificates swtpm swtpm-tools tpm2-openssl softhsm2
TOOLS    = gcc openssl python3 setpriv git swtpm swtpm_setup softhsm2-util

.PHONY: help build demo test test-packages check vuln fuzz bench man clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## bin/kmsd, bin/kmsctl, bin/kmsd-keyring and, with a C compiler, bin/kmsd-pkcs11
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)' -o bin/ ./kmsd ./kmsctl ./enclave/keyring/kmsd-keyring
	@if echo '#include <stdlib.h>' | $$($(GO) env CC) -E - >/dev/null 2>&1; then set -x; \
		CGO_ENABLED=1 $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)' -o bin/ ./enclave/pkcs11/kmsd-pkcs11; \
	else echo "no C compiler: bin/kmsd-pkcs11, the helper for PKCS#11 tokens, is not built"; fi

demo: build ## sign, encrypt and decrypt a registration packet through a private kmsd
	@CGO_ENABLED=0 $(GO) run ./docs/examples/demo -bin bin

# Twice, because the race detector makes the long loops too slow: they run in full without it (all bit flips, kills, vectors
# and key sizes, bounds of memory and of allocations), and shortened with it.
test: test-packages ## go vet, all tests, and a shorter run with the race detector
	$(GO) vet ./...
	$(GO) test -timeout 20m $(TESTFLAGS) ./...
	$(GO) test -race -short -timeout 20m $(TESTFLAGS) ./...

# Installs what the tests need where that is allowed, else says what to type.
test-packages:
	@missing=; for tool in $(TOOLS); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	echo 'int main(void){return 0;}' | gcc -x c -o /dev/null - 2>/dev/null || missing="$$missing libc"; \
	test -z "$$missing" && exit 0; \
	if test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $(PACKAGES); \
	else \
		echo "The tests need:$$missing. Type:"; echo "sudo apt-get install $(PACKAGES)"; exit 1; \
	fi

check: ## gofmt, vet (the client for macOS and Windows too), staticcheck
	@unformatted=$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go')); \
	test -z "$$unformatted" || { echo "gofmt would change:"; echo "$$unformatted"; exit 1; }
	$(GO) vet ./...
	CGO_ENABLED=0 GOOS=darwin $(GO) vet ./client/...
	CGO_ENABLED=0 GOOS=windows $(GO) vet ./client/...
	$(GO) run $(STATICCHECK) ./...

vuln: ## known vulnerabilities in what is linked (asks vuln.go.dev)
	$(GO) run $(GOVULNCHECK) ./...

fuzz: ## every fuzz target for FUZZTIME (default 30s)
	@set -e; for package in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -n1 dirname | sort -u); do \
		for target in $$($(GO) test -list '^Fuzz' $$package | grep '^Fuzz'); do \
			echo "$$package $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 20x $$package; \
		done; \
	done

bench: build ## measure the bars of docs/benchmarks.md
	$(GO) test ./kmsd/bench -run '^TestBars$$' -count=1 -timeout 60m -v -bars

man: ## write packaging/man and packaging/completions again
	$(GO) test ./kmsctl -run '^TestPackaging$$' -count=1 -update

clean: ## remove bin
	rm -rf bin

# Varve. "make help" lists what there is to make.

GO        ?= go
BIN       := bin
CACHE     ?= $(CURDIR)/.cache
TOOLS     := $(CACHE)/tools
LINT_VER  := v2.13.2
LINT      := $(TOOLS)/golangci-lint-$(LINT_VER)
CRDGEN_VER := v0.21.0
CRDGEN    := $(TOOLS)/controller-gen-$(CRDGEN_VER)
KOPIA_VER := $(shell sed -n 's,^\tgithub.com/kopia/kopia \(v[^ ]*\).*,\1,p' go.mod)
KOPIA     := $(TOOLS)/kopia-$(KOPIA_VER)
S3_VER    := $(shell sed -n 's,^\tgithub.com/versity/versitygw \(v[^ ]*\).*,\1,p' e2e/tools/go.mod)
S3        := $(TOOLS)/versitygw-$(S3_VER)
GOTESTSUM_VER := v1.13.0
GOTESTSUM := $(TOOLS)/gotestsum-$(GOTESTSUM_VER)
SOAK      ?= 1h
VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null)
LDFLAGS   := -s -w -X main.version=$(VERSION)

# Build tags: the time zones in the binary, and Google's storage over JSON only, which
# is what Kopia uses. No binary keeps debug information, so none is made: an eighth of the compiler's
# time. All targets compile with the same flags, so that each library is compiled once for all of them.
TAGS      := timetzdata,disable_grpc_modules
FLAGS     := -trimpath -tags=$(TAGS) -gcflags=all=-dwarf=false
export GOFLAGS ?= $(FLAGS)
export CGO_ENABLED ?= 1
export TAGS VARVE_RACE VARVE_NIGHTLY CACHE

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 22

.PHONY: build
build: ## Build bin/varve, a static binary
	CGO_ENABLED=0 $(GO) build $(BUILDFLAGS) $(FLAGS) -ldflags '$(LDFLAGS)' -o $(BIN)/varve ./cmd/varve

.PHONY: setup
setup: ## Install the Debian packages that the tests use (needs root)
	@scripts/setup.sh

.PHONY: check
check: lint ## Build, vet, lint and the quick tests
	$(GO) build ./...
	$(GO) test -vet=off -tags $(TAGS),testing -short ./...

.PHONY: test
test: setup $(KOPIA) $(S3) $(GOTESTSUM) ## All tests, beside stock Kopia and real tools; the race detector where there are goroutines
	VARVE_TEST_KOPIA=$(KOPIA) VARVE_TEST_S3=$(S3) GOTESTSUM=$(GOTESTSUM) scripts/test.sh

.PHONY: nightly
nightly: ## What takes hours: the race detector everywhere, every fault, a million steps of the model, every kill
	$(MAKE) test VARVE_RACE=all VARVE_NIGHTLY=1
	$(MAKE) faults
	$(MAKE) model
	$(MAKE) fuzz
	$(MAKE) e2e VARVE_E2E_KILLS=all VARVE_E2E_RACES=400

.PHONY: tools
tools: $(LINT) $(KOPIA) $(S3) $(GOTESTSUM) ## Build the tools of lint and tests, once for each version

.PHONY: model
model: ## The long run of the model test: a million steps
	VARVE_MODEL_STEPS=$${STEPS:-1000000} $(GO) test -tags $(TAGS),testing ./backup -run TestModel -timeout 0 -v

.PHONY: faults
faults: ## The sweeps of failing storage with every operation, not a sample
	VARVE_FAULTS=all $(GO) test -tags $(TAGS),testing ./backup -run 'Failing|Storage' -timeout 0 -v

.PHONY: fuzz
fuzz: ## Fuzz every parser of untrusted bytes for a while each (TIME=30s)
	scripts/fuzz.sh $${TIME:-30s}

.PHONY: lint
lint: $(LINT) ## Lint; depguard keeps the layers
	@scripts/release-notes.sh >/dev/null
	CGO_ENABLED=0 $(LINT) run ./...

.PHONY: release-notes
release-notes: ## Print the changes since the last release (VERSION=v1.2.3: collect them for that release)
	@scripts/release-notes.sh $(if $(filter command line,$(origin VERSION)),$(VERSION))

.PHONY: generate
generate: $(CRDGEN) ## Generate the objects' deep copies and CRDs from api/
	$(CRDGEN) object crd:maxDescLen=1024 paths=./api/... output:crd:dir=deploy/crds output:object:dir=api/v1alpha1
	@$(MAKE) --no-print-directory manifests

.PHONY: manifests
manifests: ## Render the Helm chart into deploy/varve.yaml and deploy/varve-admission-*.yaml
	cd e2e/chart && CGO_ENABLED=0 $(GO) run ./cmd/render -chart $(CURDIR)/deploy/helm/varve -o $(CURDIR)/deploy/varve.yaml
	cd e2e/chart && for version in v1 v1beta1; do CGO_ENABLED=0 $(GO) run ./cmd/render -chart $(CURDIR)/deploy/helm/varve \
		-admission $$version -o $(CURDIR)/deploy/varve-admission-$$version.yaml || exit; done

.PHONY: demo
demo: ## The tour: a real disk backed up four times, read, and restored
	@scripts/setup.sh e2fsprogs mount
	@echo "building varve; the first time takes some minutes, for its libraries"
	@$(MAKE) --no-print-directory build BUILDFLAGS=-v 2>&1 | scripts/count-lines.sh packages
	scripts/demo.sh $(BIN)/varve

.PHONY: bench
bench: setup build $(KOPIA) $(S3) ## Measure beside the peers and write docs/benchmarks.md
	cd e2e && VARVE=$(CURDIR)/$(BIN)/varve KOPIA=$(KOPIA) S3=$(S3) $(GO) run ./bench -out $(CURDIR)/docs/benchmarks.md

.PHONY: bench-scale
bench-scale: setup build $(KOPIA) $(S3) ## Measure how costs grow, and draw the curves in docs/benchmarks.md
	cd e2e && VARVE=$(CURDIR)/$(BIN)/varve KOPIA=$(KOPIA) S3=$(S3) $(GO) run ./bench -curves -runs 3 -out $(CURDIR)/docs/benchmarks.md

.PHONY: soak
soak: setup build $(KOPIA) $(S3) ## Load a server of a far object store for an hour (SOAK=2h: two), with an outage; its memory must not grow
	cd e2e && VARVE=$(CURDIR)/$(BIN)/varve KOPIA=$(KOPIA) S3=$(S3) $(GO) run ./bench -soak $(SOAK) -out $(CURDIR)/docs/benchmarks.md

.PHONY: kopia
kopia: $(KOPIA) ## Build stock Kopia, the same version as the library

# Stock Kopia shares the compiled libraries of Varve; its version is that of the library.
$(KOPIA):
	@mkdir -p $(TOOLS)
	@test "$$(cd e2e/tools && $(GO) list -m -f '{{.Version}}' github.com/kopia/kopia)" = $(KOPIA_VER) || \
		{ echo "e2e/tools/go.mod has another version of github.com/kopia/kopia than go.mod, which has $(KOPIA_VER)" >&2; exit 1; }
	@echo "building kopia $(KOPIA_VER)"
	cd e2e/tools && CGO_ENABLED=0 $(GO) build -o $@ github.com/kopia/kopia

$(S3):
	@mkdir -p $(TOOLS)
	@echo "building versitygw $(S3_VER)"
	cd e2e/tools && CGO_ENABLED=0 $(GO) build -o $@ github.com/versity/versitygw/cmd/versitygw

$(GOTESTSUM):
	@mkdir -p $(TOOLS)
	scripts/build-tool.sh gotest.tools/gotestsum $(GOTESTSUM_VER) gotest.tools/gotestsum $@

$(CRDGEN):
	@mkdir -p $(TOOLS)
	scripts/build-tool.sh sigs.k8s.io/controller-tools $(CRDGEN_VER) sigs.k8s.io/controller-tools/cmd/controller-gen $@

$(LINT):
	@mkdir -p $(TOOLS)
	scripts/build-tool.sh github.com/golangci/golangci-lint/v2 $(LINT_VER) github.com/golangci/golangci-lint/v2/cmd/golangci-lint $@

.PHONY: clean
clean: ## Remove what was built (not the tool cache)
	rm -rf $(BIN)

-include e2e/e2e.mk

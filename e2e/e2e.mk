# The end-to-end tests, included by the project's Makefile. docs/e2e.md tells what
# each part is for.

IMAGE ?= localhost/varve:$(or $(VERSION),dev)

.PHONY: e2e-setup
e2e-setup: ## Install the Debian packages that the test cluster uses (needs root)
	@e2e/cluster/setup.sh

.PHONY: e2e-build
e2e-build: e2e-setup ## Build the test cluster's parts, once for each version (cold: about 10 minutes)
	cd e2e && CGO_ENABLED=0 $(GO) run ./cluster/cmd/e2e-cluster build

.PHONY: e2e-cluster
e2e-cluster: e2e-setup ## Bring up a real Kubernetes on this machine (VARVE_E2E_NODES=2 for two nodes)
	cd e2e && CGO_ENABLED=0 $(GO) run ./cluster/cmd/e2e-cluster up

.PHONY: e2e-cluster-down
e2e-cluster-down: ## Take it down without a trace
	cd e2e && CGO_ENABLED=0 $(GO) run ./cluster/cmd/e2e-cluster down

.PHONY: e2e-nbd
e2e-nbd: setup ## NBD clients against varve serve, the Linux kernel in a virtual machine too (needs root)
	@e2e/nbd/setup.sh
	CGO_ENABLED=0 $(GO) build -buildvcs=false -tags $(TAGS),testing -ldflags '$(LDFLAGS)' -o $(BIN)/varve-quick ./cmd/varve
	cd e2e && CGO_ENABLED=0 VARVE_TEST_KERNEL=1 VARVE_QUICK=$(CURDIR)/$(BIN)/varve-quick $(GO) test -count=1 -timeout 90m -v -run "$${RUN:-.}" ./nbd

.PHONY: e2e-vm
e2e-vm: setup ## Back up and restore a virtual machine under libvirt (needs root)
	cd e2e && CGO_ENABLED=0 VARVE_TEST_KERNEL=1 $(GO) test -count=1 -timeout 90m -v ./vm

.PHONY: e2e
e2e: e2e-setup e2e-nbd e2e-vm e2e-prepare e2e-tests ## The end-to-end tests in a cluster of their own (RUN=regexp to choose)

.PHONY: e2e-prepare
e2e-prepare: ## Build the image and the programs of the cluster's tests
	@e2e/cluster/test.sh prepare

.PHONY: e2e-tests
e2e-tests: e2e-setup ## Run the cluster's tests with what e2e-prepare built
	@e2e/cluster/test.sh run

.PHONY: image
image: ## Build Varve's container image as an OCI archive: bin/image/varve.tar
	@mkdir -p $(BIN)/image
	CGO_ENABLED=0 $(GO) build $(FLAGS) -buildvcs=false -ldflags '$(LDFLAGS) -buildid=' -o $(BIN)/image/varve ./cmd/varve
	# Dated as the commit, so that it is the same wherever it is built; the tool itself
	# runs here, whatever GOARCH the binary is for.
	cd e2e && SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || echo 0)} CGO_ENABLED=0 GOOS= GOARCH= \
		$(GO) run ./cluster/cmd/mkimage -binary $(CURDIR)/$(BIN)/image/varve -name $(IMAGE) -version $(or $(VERSION),dev) \
		-compress=$(or $(COMPRESS),true) -o $(CURDIR)/$(BIN)/image/varve.tar -sbom $(CURDIR)/$(BIN)/image/varve.spdx.json

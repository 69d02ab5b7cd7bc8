# Everything a person does here has a target; `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
DRIVER := $(PYTHON) k8s/local/driver
CODE := gateway/src operator/src tests hack k8s bench

.PHONY: help
help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ Try it
.PHONY: demo demo-down
demo: ## From nothing to a streamed chat: cluster, images, chart, model (first run: see README)
	$(DRIVER) demo
demo-down: ## Remove the demo and the cluster it made
	$(DRIVER) down

##@ Develop (Python only)
.PHONY: setup lock fmt lint test bench bench-operator generate pictures verify run-gateway
setup: .venv/ready ## Make .venv with every pinned dependency and both packages
.venv/ready: requirements/dev.txt tests/javascript/package-lock.json gateway/pyproject.toml operator/pyproject.toml
	$(PYTHON) hack/setup_venv.py

lock: ## Pin requirements/*.in again, with hashes and without index addresses
	$(PYTHON) hack/lock.py

fmt: setup ## Format the Python code
	$(BIN)/ruff format $(CODE) && $(BIN)/ruff check --fix-only -q $(CODE)

lint: setup ## ruff, mypy strict, import layers, sizes, YAML
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy gateway/src
	$(BIN)/mypy operator/src
	$(BIN)/mypy hack
	cd k8s/local && ../../$(BIN)/mypy --config-file ../../pyproject.toml driver
	cd bench/operator && ../../$(BIN)/mypy --config-file ../../pyproject.toml .
	cd bench/gateway && ../../$(BIN)/mypy --config-file ../../pyproject.toml .
	$(BIN)/mypy tests
	$(BIN)/lint-imports --no-cache
	$(BIN)/python hack/check_sizes.py gateway/src operator/src hack k8s/local tests bench
	$(BIN)/yamllint -s .

# Bytecode is kept, whatever the caller's environment says: each worker and each program under test loads it again.
test: setup ## Unit, golden, component, contract and chart tests, on all cores
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -m "not e2e" -n auto --maxprocesses=8 --dist worksteal

bench: setup .venv/bench/ready ## What streams cost, beside nginx (needed on PATH) and vllm-router, into docs/benchmarks.md
	$(BIN)/python bench/gateway --write --python $${GATEWAY_PYTHON:-$(BIN)/python}
.venv/bench/ready: requirements/bench.txt
	$(PYTHON) -m venv .venv/bench
	.venv/bench/bin/pip install -q --disable-pip-version-check --require-hashes -r requirements/bench.txt
	@touch $@

bench-operator: setup ## What hundreds of models cost the operator, beside a bare loop (makes a cluster; half an hour)
	$(DRIVER) up
	$(DRIVER) kwok up --nodes $(if $(KUBE_API_QPS),260,130) --gpus 8
	KUBECONFIG=$$($(DRIVER) kubeconfig) $(BIN)/python bench/operator $(if $(KUBE_API_QPS),,--models 500 1000 --no-edits) --write docs/benchmarks.md

generate: setup ## Write the generated files: CRD, k8s/install.yaml, dashboard copies
	$(BIN)/python hack/generate.py

pictures: setup ## Draw the dashboards into docs/dashboards from PROMETHEUS=http://… (MINUTES=60, WINDOW=1m)
	@test -n "$(PROMETHEUS)" || { echo "pictures: say which Prometheus has the data: make pictures PROMETHEUS=http://127.0.0.1:9090" >&2; exit 2; }
	$(BIN)/python hack/pictures.py $(PROMETHEUS) --minutes $(or $(MINUTES),60) --window $(or $(WINDOW),1m)

verify: setup ## Fail if a generated file is not what `make generate` writes
	$(BIN)/python hack/generate.py --check

run-gateway: setup ## Run the gateway here, in front of VLLM_URL
	$(BIN)/vllm-gateway

##@ Release
.PHONY: release-check package sbom audit workflows
RELEASE := .venv/release
release-check: setup ## Fail where two places that carry the version disagree (TAG=v0.1.0 for a tag)
	$(BIN)/python hack/release_check.py $(TAG)
package: setup ## Pack both charts into dist/
	$(BIN)/python hack/package.py
sbom: setup $(RELEASE)/ready ## What a release is made of, as CycloneDX, into dist/sbom/
	$(BIN)/python hack/sbom.py
audit: $(RELEASE)/ready ## Known vulnerabilities of the images' dependencies; fails without the database
	$(RELEASE)/bin/python hack/audit.py
workflows: setup $(RELEASE)/ready ## actionlint over .github/workflows, and k8s/compose.yaml by its schema
	$(BIN)/python hack/workflows.py
	$(RELEASE)/bin/check-jsonschema --builtin-schema vendor.compose-spec k8s/compose.yaml
$(RELEASE)/ready: requirements/release.txt | setup
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip -q --disable-pip-version-check install --require-hashes -r requirements/release.txt
	touch $@

##@ Cluster
.PHONY: cluster cluster-down images test-e2e
cluster: ## A Kubernetes: CLUSTER=existing, kind where Docker answers, else a local one built from Go modules
	$(DRIVER) up
cluster-down: ## Remove the cluster that `make cluster` made
	$(DRIVER) down
images: ## Build the operator, gateway and vllm-cpu images
	$(DRIVER) images
test-e2e: setup ## End-to-end tests on the cluster, which is made when there is none
	$(DRIVER) up --images
	$(DRIVER) prometheus
	KUBECONFIG=$$($(DRIVER) kubeconfig) $(BIN)/pytest -m e2e tests/e2e

// Prints the Prometheus configuration that the Prometheus Operator makes of monitors.
//
// Standard input is what `kubectl get servicemonitors,podmonitors -A -o json` prints; the argument is the version of the
// Prometheus that is to read the result. The generator is the operator's own, so what is wrong in a monitor (a port, a
// path, a selector) is wrong here as it would be in a cluster with the operator.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"github.com/prometheus-operator/prometheus-operator/pkg/assets"
	"github.com/prometheus-operator/prometheus-operator/pkg/prometheus"
)

type monitors struct {
	services map[string]*monitoring.ServiceMonitor
	pods     map[string]*monitoring.PodMonitor
}

func (m *monitors) add(object json.RawMessage) error {
	var head struct {
		Kind     string
		Metadata struct{ Name, Namespace string }
	}
	if err := json.Unmarshal(object, &head); err != nil {
		return err
	}
	key := head.Metadata.Namespace + "/" + head.Metadata.Name
	switch head.Kind {
	case "ServiceMonitor":
		m.services[key] = &monitoring.ServiceMonitor{}
		return json.Unmarshal(object, m.services[key])
	case "PodMonitor":
		m.pods[key] = &monitoring.PodMonitor{}
		return json.Unmarshal(object, m.pods[key])
	}
	return fmt.Errorf("%s is a %q, neither ServiceMonitor nor PodMonitor", key, head.Kind)
}

func read(in io.Reader) (*monitors, error) {
	var list struct{ Items []json.RawMessage }
	if err := json.NewDecoder(in).Decode(&list); err != nil {
		return nil, err
	}
	found := &monitors{map[string]*monitoring.ServiceMonitor{}, map[string]*monitoring.PodMonitor{}}
	for _, object := range list.Items {
		if err := found.add(object); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// generate takes the Prometheus object's defaults: what a person gets who installs the operator and says nothing more.
func generate(found *monitors, version string) ([]byte, error) {
	role := monitoring.EndpointSliceRole
	server := &monitoring.Prometheus{}
	server.Name, server.Namespace = "prometheus", "default"
	server.Spec.Version, server.Spec.ServiceDiscoveryRole = version, &role
	logger := slog.New(slog.NewTextHandler(os.Stderr, nil))
	generator, err := prometheus.NewConfigGenerator(logger, server, prometheus.WithEndpointSliceSupport())
	if err != nil {
		return nil, err
	}
	// The monitors name no Secrets or ConfigMaps, so the store that would read them is empty.
	store := assets.NewTestStoreBuilder()
	return generator.GenerateServerConfiguration(
		server, found.services, found.pods, nil, nil, store, nil, nil, nil, nil)
}

func run() error {
	if len(os.Args) != 2 {
		return fmt.Errorf("usage: prometheus-config PROMETHEUS_VERSION < monitors.json")
	}
	found, err := read(os.Stdin)
	if err != nil {
		return err
	}
	text, err := generate(found, os.Args[1])
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(text)
	return err
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

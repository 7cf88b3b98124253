"""The controller: composes the configuration, wires the steps, and runs each as a job of its own."""

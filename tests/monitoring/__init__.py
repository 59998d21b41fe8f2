"""What watches a cluster: the page of metrics, the dashboard, the alerts, and a real Prometheus."""

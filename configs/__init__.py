"""Configurations: `<app>.yaml` runs in minutes on a laptop, `<app>/<recipe>.yaml` is a published recipe."""

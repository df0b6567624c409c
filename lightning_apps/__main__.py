"""List the apps of the suite: `python -m lightning_apps`."""

import pkgutil
import sys
from importlib import import_module

import lightning_apps
from lightning_apps.app import App


def find_apps() -> list[App]:
    """Every app of the package, by name."""
    apps = []
    for module in pkgutil.iter_modules(lightning_apps.__path__):
        if not module.name.startswith("_"):
            app = getattr(import_module(f"lightning_apps.{module.name}"), "APP", None)
            if isinstance(app, App):
                apps.append(app)
    return sorted(apps, key=lambda app: app.name)


def describe(app: App) -> str:
    """One line: name, summary, and the extra to install where something is missing."""
    missing = app.missing()
    line = f"  {app.name:<10} {app.summary}"
    if missing:
        extras = ",".join(sorted(set(missing.values())))
        line += f"  [lacks {', '.join(missing)}: pip install 'lightning-apps[{extras}]']"
    return line


def main() -> int:
    """Print the apps and how to start one."""
    print("Apps (python -m lightning_apps.<app> fit|validate|test|predict|export --help):")
    for app in find_apps():
        print(describe(app))
    return 0


if __name__ == "__main__":
    sys.exit(main())

from cellflux_bridge.cli import main

main()

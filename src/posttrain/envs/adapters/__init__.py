"""Environments that other libraries brought: thin layers over their protocols, with nothing imported before it is
used."""

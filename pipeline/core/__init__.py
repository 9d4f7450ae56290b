"""What every stage stands on: params, files, parts of work, devices, weights, the ontology."""

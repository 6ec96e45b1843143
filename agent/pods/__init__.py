"""podspan.agent.pods: whose exchange it was."""

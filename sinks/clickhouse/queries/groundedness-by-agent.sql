-- How well each agent's results are grounded in evidence, and what the Overseer decided on them
SELECT
    agent,
    capability,
    count() AS assessed,
    round(avg(groundedness), 3) AS mean_groundedness,
    round(min(groundedness), 3) AS lowest,
    countIf(decision = 'accept') AS accepted,
    countIf(decision = 'revise') AS sent_back,
    countIf(decision = 'reject') AS rejected
FROM steps
WHERE decision != ''
GROUP BY agent, capability
ORDER BY mean_groundedness, agent

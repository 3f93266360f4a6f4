CREATE OR REPLACE VIEW llm_calls AS
SELECT
    task_id,
    JSONExtractString(payload, 'agent') AS agent,
    JSONExtractString(payload, 'provider') AS provider,
    JSONExtractString(payload, 'model') AS model,
    JSONExtractString(JSONExtractString(payload, 'request'), 'purpose') AS purpose,
    JSONExtractUInt(payload, 'prompt_tokens') AS prompt_tokens,
    JSONExtractUInt(payload, 'completion_tokens') AS completion_tokens,
    prompt_tokens + completion_tokens AS tokens,
    JSONExtractFloat(payload, 'cost_usd') AS cost_usd,
    JSONExtractFloat(payload, 'latency_ms') AS latency_ms,
    JSONExtractString(payload, 'error') AS error,
    timestamp AS at,
    JSONExtractString(payload, 'request') AS request,
    JSONExtractString(payload, 'response') AS response,
    id AS event_id,
    causation_id
FROM event_log FINAL
PREWHERE type = 'magnatronic.effects.LlmCalled';

CREATE OR REPLACE VIEW tool_calls AS
SELECT
    task_id,
    JSONExtractString(payload, 'agent') AS agent,
    JSONExtractString(payload, 'tool') AS tool,
    JSONExtractBool(payload, 'side_effects') AS side_effects,
    JSONExtractFloat(payload, 'latency_ms') AS latency_ms,
    JSONExtractString(payload, 'error') AS error,
    timestamp AS at,
    JSONExtractString(payload, 'request') AS request,
    JSONExtractString(payload, 'result') AS result,
    id AS event_id,
    causation_id
FROM event_log FINAL
PREWHERE type = 'magnatronic.effects.ToolCalled';

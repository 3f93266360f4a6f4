-- A row for each task that was submitted. duration_ms is from the broker's append of the submission to that of the
-- outcome; it and finished_at are NULL while the task is open.
CREATE OR REPLACE VIEW tasks AS
WITH
    told AS
    (
        SELECT
            task_id,
            min(timestamp) AS submitted_at,
            argMin(JSONExtractString(payload, 'objective'), timestamp) AS objective,
            argMin(JSONExtractString(payload, 'priority'), timestamp) AS priority,
            argMin(JSONExtractString(payload, 'submitted_by'), timestamp) AS submitted_by
        FROM event_log FINAL
        PREWHERE type = 'magnatronic.tasks.TaskSubmitted'
        GROUP BY task_id
    ),
    plans AS
    (
        SELECT task_id, argMin(JSONLength(payload, 'steps'), timestamp) AS steps
        FROM event_log FINAL
        PREWHERE type = 'magnatronic.tasks.PlanProposed'
        GROUP BY task_id
    ),
    outcomes AS
    (
        SELECT
            task_id,
            min(timestamp) AS finished_at,
            argMin(splitByChar('.', type)[-1], timestamp) AS outcome,
            argMin(JSONExtractString(payload, 'answer'), timestamp) AS answer,
            argMin(JSONExtract(payload, 'groundedness', 'Nullable(Float64)'), timestamp) AS groundedness,
            argMin(
                if(type = 'magnatronic.tasks.TaskExpired', 'the deadline passed', JSONExtractString(payload, 'reason')),
                timestamp) AS reason
        FROM event_log FINAL
        PREWHERE type IN (
            'magnatronic.tasks.TaskCompleted', 'magnatronic.tasks.TaskFailed',
            'magnatronic.tasks.TaskExpired', 'magnatronic.tasks.TaskCancelled')
        GROUP BY task_id
    ),
    spent AS
    (
        SELECT
            task_id,
            count() AS llm_calls,
            sum(JSONExtractUInt(payload, 'prompt_tokens') + JSONExtractUInt(payload, 'completion_tokens')) AS tokens,
            sum(JSONExtractFloat(payload, 'cost_usd')) AS cost_usd
        FROM event_log FINAL
        PREWHERE type = 'magnatronic.effects.LlmCalled'
        GROUP BY task_id
    )
SELECT
    told.task_id AS task_id,
    told.objective AS objective,
    told.priority AS priority,
    multiIf(
        outcomes.outcome != '', lower(substring(outcomes.outcome, 5)),
        plans.task_id != '', 'running',
        'submitted') AS status,
    told.submitted_at AS submitted_at,
    if(outcomes.outcome != '', toNullable(outcomes.finished_at), NULL) AS finished_at,
    dateDiff('millisecond', submitted_at, finished_at) AS duration_ms,
    plans.steps AS steps,
    outcomes.answer AS answer,
    outcomes.groundedness AS groundedness,
    spent.llm_calls AS llm_calls,
    spent.tokens AS tokens,
    spent.cost_usd AS cost_usd,
    outcomes.reason AS reason,
    told.submitted_by AS submitted_by
FROM told
LEFT JOIN plans ON told.task_id = plans.task_id
LEFT JOIN outcomes ON told.task_id = outcomes.task_id
LEFT JOIN spent ON told.task_id = spent.task_id;

-- The changelog of PostgreSQL 13 and newer. A blank line ends a statement: there is none inside one.
-- No statement has a percent sign or a bind parameter: drivers and templates leave the text alone.
-- Who reads needs: GRANT USAGE ON SCHEMA sa_tablecache TO reader;
--                  GRANT SELECT ON ALL TABLES IN SCHEMA sa_tablecache TO reader;
-- Who writes watched tables needs nothing. Who watches tables owns them and this schema.
CREATE SCHEMA IF NOT EXISTS sa_tablecache

CREATE TABLE IF NOT EXISTS sa_tablecache.meta (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    version integer NOT NULL
)

-- Which tables are watched, and how: {"key": [...], "ranges": [...], "limit": n, "version": n,
-- "types": {"column": "type"}}.
CREATE TABLE IF NOT EXISTS sa_tablecache.watched (
    schema text,
    name text,
    logger text NOT NULL,
    definition jsonb NOT NULL,
    PRIMARY KEY (schema, name)
)

-- Without WAL, as the changelog: a crash and a failover empty both, and may use ids again.
-- trimmed: all changes that were deleted are below it; ended: so are all that may be deleted now;
-- horizon: all below it had ended at horizon_at.
CREATE UNLOGGED TABLE IF NOT EXISTS sa_tablecache.alive (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    incarnation text NOT NULL DEFAULT translate(left(gen_random_uuid()::text, 13), '-', ''),
    started timestamptz NOT NULL,
    database oid NOT NULL,
    relation oid NOT NULL,
    trimmed xid8 NOT NULL DEFAULT '0',
    ended xid8 NOT NULL DEFAULT '0',
    horizon xid8 NOT NULL DEFAULT pg_snapshot_xmin(pg_current_snapshot()),
    horizon_at timestamptz NOT NULL DEFAULT clock_timestamp()
)

-- One row for each statement that wrote a watched table. keys: [[key, ...], ...], NULL for any row;
-- ranges: {"column": [smallest, largest]}.
CREATE UNLOGGED TABLE IF NOT EXISTS sa_tablecache.changelog (
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    schema text NOT NULL,
    name text NOT NULL,
    operation text NOT NULL,
    keys text,
    ranges text
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000,
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 20000
)

-- Neither this nor the view is made where it is: that takes a lock until the transaction ends, for
-- which all writers of watched tables would wait, and all readers who have to poll.
DO $index$
BEGIN
    IF to_regclass('sa_tablecache.changelog_xid') IS NULL THEN
        CREATE INDEX changelog_xid ON sa_tablecache.changelog (xid);
    END IF;
END
$index$

-- The row of alive, if it was made by this server since it was started, and in this database: a
-- copy of files and a restored dump bring along one that says nothing of the transaction ids.
DO $view$
BEGIN
    IF to_regclass('sa_tablecache.incarnation') IS NULL THEN
        CREATE VIEW sa_tablecache.incarnation AS
        SELECT a.incarnation, a.trimmed
        FROM sa_tablecache.alive AS a
        WHERE a.started = pg_postmaster_start_time()
            AND a.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
            AND a.relation = a.tableoid;
    END IF;
END
$view$

-- What has become visible since a snapshot, to the statement that calls it (STABLE). By the index,
-- whatever is known of a table that grows and shrinks all the time.
CREATE OR REPLACE FUNCTION sa_tablecache.since(
    of_incarnation text, after xid8, running xid8[]
) RETURNS SETOF sa_tablecache.changelog
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $since$
BEGIN
    IF EXISTS (
        SELECT FROM sa_tablecache.incarnation AS i WHERE i.incarnation = of_incarnation
    ) THEN
        RETURN QUERY
        SELECT c.* FROM sa_tablecache.changelog AS c WHERE c.xid >= after
        UNION ALL
        SELECT c.* FROM sa_tablecache.changelog AS c WHERE c.xid = ANY (running);
    END IF;
END
$since$

-- Begins a new incarnation where there is none.
CREATE OR REPLACE FUNCTION sa_tablecache.revive() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $revive$
BEGIN
    INSERT INTO sa_tablecache.alive AS a (started, database, relation)
    SELECT pg_postmaster_start_time(), d.oid, 'sa_tablecache.alive'::regclass
    FROM pg_database AS d WHERE d.datname = current_database()
    ON CONFLICT (one) DO UPDATE SET incarnation = DEFAULT, started = excluded.started,
        database = excluded.database, relation = excluded.relation,
        trimmed = DEFAULT, ended = DEFAULT,
        horizon = DEFAULT, horizon_at = DEFAULT
    WHERE (a.started, a.database, a.relation)
        IS DISTINCT FROM (excluded.started, excluded.database, excluded.relation);
    IF FOUND THEN
        -- What a dump brought along of another server's future would come at every poll.
        DELETE FROM sa_tablecache.changelog
        WHERE xid >= pg_snapshot_xmax(pg_current_snapshot());
    END IF;
END
$revive$

-- Deletes what ended before a horizon that is at least `keep` seconds old: by the time of the write,
-- changes of a long transaction would be gone before anybody could see them.
CREATE OR REPLACE FUNCTION sa_tablecache.trim(keep double precision, batch integer)
RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $trim$
DECLARE
    deleted bigint;
    newest numeric;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended('sa_tablecache.trim', 0)) THEN
        RETURN -1;
    ELSIF NOT EXISTS (SELECT FROM sa_tablecache.incarnation) THEN
        RETURN 0;
    END IF;
    UPDATE sa_tablecache.alive
    SET ended = horizon, horizon = pg_snapshot_xmin(pg_current_snapshot()),
        horizon_at = clock_timestamp()
    WHERE horizon_at <= clock_timestamp() - make_interval(secs => keep);
    WITH gone AS (
        DELETE FROM sa_tablecache.changelog
        WHERE ctid = ANY (ARRAY(
            SELECT c.ctid FROM sa_tablecache.changelog AS c
            WHERE c.xid < (SELECT a.ended FROM sa_tablecache.alive AS a)
            ORDER BY c.xid LIMIT batch
        ))
        RETURNING xid
    )
    SELECT count(*), max(gone.xid::text::numeric) INTO deleted, newest FROM gone;
    IF deleted > 0 THEN
        UPDATE sa_tablecache.alive
        SET trimmed = greatest(trimmed, (newest + 1)::text::xid8);
    END IF;
    RETURN deleted;
END
$trim$

-- Logs a change of any row of a table, for what no trigger sees.
CREATE OR REPLACE FUNCTION sa_tablecache.invalidate(of_schema text, of_name text) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $invalidate$
    INSERT INTO sa_tablecache.changelog (schema, name, operation) VALUES (of_schema, of_name, 'T')
$invalidate$

-- How a column is written as JSON, whatever the settings of the session. An output function is the
-- database's own code; a cast to json or text could be anybody's, and would run as the owner: only
-- types of the database are cast. Those that need no escaping are quick.
CREATE OR REPLACE FUNCTION sa_tablecache.as_json(type oid, value text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $as_json$
    SELECT concat('coalesce(', CASE
        WHEN type IN ('boolean'::regtype, 'smallint'::regtype, 'integer'::regtype,
                      'bigint'::regtype, 'oid'::regtype) THEN concat(value, '::text')
        WHEN type IN ('uuid'::regtype, 'numeric'::regtype)
            THEN concat('''"'' || ', value, '::text || ''"''')
        WHEN type = 'bytea'::regtype THEN concat('''"'' || encode(', value, ', ''hex'') || ''"''')
        WHEN type = 'timestamptz'::regtype THEN concat(
            'left(to_json(', value, ' AT TIME ZONE ''UTC'')::text, -1) || ''+00:00"''')
        WHEN type IN ('text'::regtype, 'varchar'::regtype, 'character'::regtype, 'name'::regtype,
                      'real'::regtype, 'double precision'::regtype, 'date'::regtype,
                      'time'::regtype, 'timetz'::regtype, 'timestamp'::regtype)
            THEN concat('to_json(', value, ')::text')
        ELSE concat('CASE WHEN num_nulls(', value, ') = 0 THEN to_json(concat(', value, '))::text END')
    END, ', ''null'')')
$as_json$

-- Whatever a statement may name that writes rows of a table: its partitions and children, and what
-- these are partitions and children of. Temporary children are seen by one session only.
CREATE OR REPLACE FUNCTION sa_tablecache.members(root oid)
RETURNS TABLE (member oid, inherited text)
LANGUAGE sql STABLE AS $members$
    WITH RECURSIVE down (member) AS (
        SELECT root
        UNION
        SELECT i.inhrelid
        FROM down AS d
        CROSS JOIN LATERAL (
            SELECT h.inhrelid FROM pg_catalog.pg_inherits AS h
            WHERE h.inhparent = d.member OFFSET 0  -- else all are read, where there are few
        ) AS i
        JOIN pg_catalog.pg_class AS c ON c.oid = i.inhrelid AND c.relpersistence <> 't'
    ), up (member) AS (
        SELECT d.member FROM down AS d
        UNION
        SELECT i.inhparent
        FROM up AS u
        CROSS JOIN LATERAL (
            SELECT h.inhparent FROM pg_catalog.pg_inherits AS h
            WHERE h.inhrelid = u.member OFFSET 0
        ) AS i
    )
    SELECT u.member, (
        SELECT string_agg(concat(h.inhparent, ':', h.xmin), ' ' ORDER BY h.inhparent)
        FROM pg_catalog.pg_inherits AS h WHERE h.inhrelid = u.member
    )
    FROM up AS u
$members$

-- Watches a table and its partitions and children, or again those that came later. Without a key:
-- as before, or by its primary key. Locks each table that lacks a trigger against writers.
CREATE OR REPLACE FUNCTION sa_tablecache.watch(
    of_schema text, of_name text, key text[] DEFAULT NULL, ranges text[] DEFAULT NULL,
    most integer DEFAULT NULL
) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET quote_all_identifiers = off AS $watch$
#variable_conflict use_column
DECLARE
    about CONSTANT text := concat(quote_ident(of_schema), '.', quote_ident(of_name));
    suffix CONSTANT text := md5(concat_ws('.', octet_length(of_schema), of_schema, of_name));
    logger CONSTANT text := concat('log_', suffix);
    relation pg_class;
    before jsonb;
    attribute record;
    event record;
    member record;
    trigger record;
    names text[] := '{}';
    bounds text[] := '{}';
    columns text[] := '{}';
    types jsonb := '{}';
    plain boolean := false;
    volatile boolean := false;
    identity text;
    bounded text;
    written text;
    counted text;
    logged text;
    spanned text;
    source text;
    settings text;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('sa_tablecache.watch', 0));
    SELECT c.* INTO relation
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = of_schema AND c.relname = of_name;
    IF relation.oid IS NULL THEN
        RAISE undefined_table USING MESSAGE = concat('cannot watch ', about, ': no such table');
    ELSIF relation.relkind NOT IN ('r', 'p') OR relation.relpersistence = 't' THEN
        RAISE wrong_object_type USING
            MESSAGE = concat('cannot watch ', about, ': it is not an ordinary table'),
            HINT = 'Views are watched by the tables behind them; temporary tables are of one session.';
    END IF;
    SELECT w.definition INTO before FROM sa_tablecache.watched AS w
    WHERE w.schema = of_schema AND w.name = of_name;
    IF key IS NULL AND before IS NOT NULL THEN
        key := ARRAY(SELECT jsonb_array_elements_text(before -> 'key'));
        ranges := coalesce(ranges, ARRAY(SELECT jsonb_array_elements_text(before -> 'ranges')));
        most := coalesce(most, (before ->> 'limit')::integer);
    ELSIF key IS NULL THEN
        key := ARRAY(
            SELECT a.attname::text
            FROM pg_index AS i
            CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k (number, place)
            JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.number
            WHERE i.indrelid = relation.oid AND i.indisprimary ORDER BY k.place
        );
    END IF;
    ranges := coalesce(ranges, '{}');
    most := coalesce(most, 1000);
    IF most < 1 OR cardinality(key) > 32 OR cardinality(ranges) > 32 THEN
        RAISE invalid_parameter_value USING MESSAGE = concat(
            'cannot watch ', about, ': a limit is at least 1, and at most 32 columns are logged');
    END IF;
    FOR attribute IN
        WITH RECURSIVE stored (column_name, ranged, place, number, declared, type, base) AS (
            SELECT u.name, u.ranged, u.place, a.attnum, a.atttypid, a.atttypid, t.typbasetype
            FROM (
                SELECT k.name, false AS ranged, k.place FROM unnest(key) WITH ORDINALITY AS k (name, place)
                UNION ALL
                SELECT r.name, true, r.place FROM unnest(ranges) WITH ORDINALITY AS r (name, place)
            ) AS u
            LEFT JOIN pg_attribute AS a ON a.attrelid = relation.oid AND a.attname = u.name
                AND a.attnum > 0 AND NOT a.attisdropped
            LEFT JOIN pg_type AS t ON t.oid = a.atttypid
            UNION ALL
            SELECT s.column_name, s.ranged, s.place, s.number, s.declared, t.oid, t.typbasetype
            FROM stored AS s JOIN pg_type AS t ON t.oid = s.base
        )
        SELECT s.* FROM stored AS s WHERE s.base IS NULL OR s.base = 0 ORDER BY s.ranged, s.place
    LOOP
        types := types || jsonb_build_object(attribute.column_name, attribute.declared::regtype::text);
        IF attribute.number IS NULL THEN
            RAISE undefined_column USING MESSAGE = concat(
                'cannot watch ', about, ': it has no column ', quote_ident(attribute.column_name));
        ELSIF NOT attribute.ranged THEN
            names := names || sa_tablecache.as_json(
                attribute.type, concat('q.', quote_ident(attribute.column_name)));
            plain := cardinality(key) = 1 AND attribute.type IN (
                'smallint'::regtype, 'integer'::regtype, 'bigint'::regtype);
            volatile := volatile OR attribute.type NOT IN (
                'boolean'::regtype, 'smallint'::regtype, 'integer'::regtype, 'bigint'::regtype,
                'oid'::regtype, 'text'::regtype, 'varchar'::regtype, 'character'::regtype,
                'name'::regtype, 'uuid'::regtype, 'date'::regtype, 'time'::regtype,
                'timetz'::regtype, 'timestamp'::regtype, 'timestamptz'::regtype, 'bytea'::regtype,
                'numeric'::regtype);
        ELSIF attribute.type IN (
            'smallint'::regtype, 'integer'::regtype, 'bigint'::regtype, 'numeric'::regtype,
            'double precision'::regtype, 'date'::regtype, 'time'::regtype, 'timestamp'::regtype,
            'timestamptz'::regtype, 'text'::regtype, 'varchar'::regtype
        ) THEN
            identity := concat('q.', quote_ident(attribute.column_name));
            bounded := identity;
            IF attribute.type IN ('text'::regtype, 'varchar'::regtype) THEN
                bounded := concat(identity, ' COLLATE "C"');
            END IF;
            columns := columns || identity;
            bounds := bounds || concat(
                quote_literal(attribute.column_name),
                ', CASE WHEN count(', identity, ') IN (0, count(*)) THEN concat(''['', ',
                sa_tablecache.as_json(attribute.type, concat('min(', bounded, ')')), ', '','', ',
                sa_tablecache.as_json(attribute.type, concat('max(', bounded, ')')),
                ', '']'')::json END');
            volatile := volatile OR attribute.type = 'double precision'::regtype;
        ELSE
            RAISE datatype_mismatch USING MESSAGE = concat(
                'cannot watch ', about, ': no range of ', quote_ident(attribute.column_name),
                ' can be logged, whose type is ', attribute.type::regtype);
        END IF;
    END LOOP;
    -- A single integer is quicker as it is. Of an UPDATE old and new rows come in the same order:
    -- the same keys are the same array, which costs less to find out than which keys are the same.
    -- Who reads does that.
    identity := CASE
        WHEN names = '{}' THEN 'NULL::text'
        WHEN plain THEN concat('q.', quote_ident(key[1]))
        ELSE concat('concat(''['', ', array_to_string(names, ', '','', '), ', '']'')') END;
    bounded := concat('json_build_object(', array_to_string(bounds, ', '), ')::text');
    FOR event IN
        SELECT e.name, e.rows
        FROM (VALUES
            ('INSERT', '{new_rows}'::text[]),
            ('UPDATE', '{old_rows,new_rows}'),
            ('DELETE', '{old_rows}')
        ) AS e (name, rows)
    LOOP
        written := array_to_string(ARRAY(
            SELECT concat(
                E'\n                (SELECT count(*) AS n, array_agg(q.k) AS keys FROM (SELECT ',
                identity, ' AS k FROM ', r, ' AS q LIMIT ', most + 1, ') AS q) AS ', r)
            FROM unnest(event.rows) AS r), ',');
        spanned := concat('(SELECT ', bounded, ' FROM (', array_to_string(ARRAY(
            SELECT concat('SELECT ', array_to_string(columns, ', '), ' FROM ', r, ' AS q')
            FROM unnest(event.rows) AS r), ' UNION ALL '), ') AS q)');
        counted := concat(event.rows[1], '.n');
        logged := concat(event.rows[1], '.keys');
        IF event.name = 'UPDATE' THEN
            counted := 'greatest(old_rows.n, new_rows.n)';
            logged := 'old_rows.keys || nullif(new_rows.keys, old_rows.keys)';
        END IF;
        logged := CASE WHEN plain
            THEN concat('concat(''[['', array_to_string(', logged, ', ''],['', ''null''), '']]'')')
            ELSE concat('concat(''['', array_to_string(', logged, ', '',''), '']'')') END;
        source := concat(source,
            CASE WHEN source IS NULL THEN 'IF' ELSE 'ELSIF' END, ' TG_OP = ', quote_literal(event.name),
            E' THEN\n            SELECT ', counted, E',\n                ',
            CASE WHEN names = '{}' THEN 'NULL'
                ELSE concat('CASE WHEN ', counted, ' <= ', most, ' THEN ', logged, ' END') END,
            E',\n                ',
            CASE WHEN bounds = '{}' THEN 'NULL' WHEN names = '{}' THEN spanned
                ELSE concat('CASE WHEN ', counted, ' > ', most, ' THEN ', spanned, ' END') END,
            E'\n            INTO counted, logged, spanned FROM', written, E';\n        ');
    END LOOP;
    -- Nothing may keep the application from writing: where columns have gone or are of another type
    -- by now, as they are above a table that inherits, any row was written.
    source := concat(
        E'\nDECLARE\n    counted bigint;\n    logged text;\n    spanned text;\n',
        E'BEGIN\n    BEGIN\n        ', source, E'END IF;\n',
        E'    EXCEPTION WHEN OTHERS THEN\n',
        E'        counted := NULL; logged := NULL; spanned := NULL;\n    END;\n',
        E'    IF counted IS DISTINCT FROM 0 THEN\n',
        E'        INSERT INTO sa_tablecache.changelog (schema, name, operation, keys, ranges)\n',
        '        VALUES (', quote_literal(of_schema), ', ', quote_literal(of_name),
        E', left(TG_OP, 1), logged, spanned);\n    END IF;\n    RETURN NULL;\nEND\n');
    settings := concat(
        'SET search_path = pg_catalog, pg_temp',
        CASE WHEN volatile THEN
            ' SET extra_float_digits = 1 SET DateStyle = ''ISO, YMD'' SET TimeZone = ''UTC'''
            ' SET IntervalStyle = ''postgres'' SET bytea_output = ''hex'' SET lc_monetary = ''C'''
        END);
    -- A function that is as it should be is left alone: readers notice what is made anew.
    IF NOT EXISTS (
        SELECT FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
        WHERE n.nspname = 'sa_tablecache' AND p.proname = logger AND p.prosrc = source
            AND p.prosecdef AND (cardinality(p.proconfig) > 1) = volatile
    ) THEN
        EXECUTE concat(
            'CREATE OR REPLACE FUNCTION sa_tablecache.', logger, '() RETURNS trigger ',
            'LANGUAGE plpgsql SECURITY DEFINER ', settings, ' AS ', quote_literal(source));
        EXECUTE concat('COMMENT ON FUNCTION sa_tablecache.', logger, '() IS ', quote_literal(about));
    END IF;
    INSERT INTO sa_tablecache.watched AS w (schema, name, logger, definition)
    VALUES (of_schema, of_name, logger, jsonb_build_object(
        'key', to_jsonb(key), 'ranges', to_jsonb(ranges), 'limit', most, 'types', types,
        'version', (SELECT m.version FROM sa_tablecache.meta AS m)))
    ON CONFLICT (schema, name) DO UPDATE SET logger = excluded.logger, definition = excluded.definition
    WHERE (w.logger, w.definition) IS DISTINCT FROM (excluded.logger, excluded.definition);
    FOR member IN
        SELECT m.oid, m.relkind, concat(quote_ident(n.nspname), '.', quote_ident(m.relname)) AS name
        FROM sa_tablecache.members(relation.oid) AS f (member, inherited)
        JOIN pg_class AS m ON m.oid = f.member JOIN pg_namespace AS n ON n.oid = m.relnamespace
        ORDER BY m.oid
    LOOP
        IF member.relkind NOT IN ('r', 'p') THEN
            RAISE wrong_object_type USING MESSAGE = concat(
                'cannot watch ', about, ': ', member.name, ' is a foreign table, which nobody sees changing');
        END IF;
        FOR trigger IN
            SELECT e.event, concat('sa_tablecache_', lower(e.event), '_', suffix) AS name, e.rows,
                t.oid AS there, coalesce(t.tgenabled = 'A' AND t.tgtype = e.type
                    AND t.tgfoid = to_regprocedure(concat('sa_tablecache.', logger, '()')), false) AS fine
            FROM (VALUES
                ('INSERT', 4, 'REFERENCING NEW TABLE AS new_rows'),
                ('DELETE', 8, 'REFERENCING OLD TABLE AS old_rows'),
                ('UPDATE', 16, 'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows'),
                ('TRUNCATE', 32, '')
            ) AS e (event, type, rows)
            LEFT JOIN pg_trigger AS t ON t.tgrelid = member.oid
                AND t.tgname = concat('sa_tablecache_', lower(e.event), '_', suffix)
        LOOP
            CONTINUE WHEN trigger.fine;
            IF trigger.there IS NOT NULL THEN
                EXECUTE concat('DROP TRIGGER ', trigger.name, ' ON ', member.name);
            END IF;
            EXECUTE concat(
                'CREATE TRIGGER ', trigger.name, ' AFTER ', trigger.event, ' ON ', member.name, ' ',
                trigger.rows, ' FOR EACH STATEMENT EXECUTE FUNCTION sa_tablecache.', logger, '()');
            EXECUTE concat(
                'ALTER TABLE ONLY ', member.name, ' ENABLE ALWAYS TRIGGER ', trigger.name);
        END LOOP;
    END LOOP;
    -- What no longer writes its rows, or has lost its name to another table.
    FOR trigger IN
        SELECT t.tgname, concat(quote_ident(n.nspname), '.', quote_ident(c.relname)) AS relation
        FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = t.tgrelid
        JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE t.tgfoid = to_regprocedure(concat('sa_tablecache.', logger, '()'))
            AND t.tgrelid NOT IN (SELECT f.member FROM sa_tablecache.members(relation.oid) AS f)
    LOOP
        EXECUTE concat('DROP TRIGGER ', quote_ident(trigger.tgname), ' ON ', trigger.relation);
    END LOOP;
END
$watch$

-- No longer watches a table: its triggers go with their function.
CREATE OR REPLACE FUNCTION sa_tablecache.unwatch(of_schema text, of_name text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $unwatch$
DECLARE
    logger text;
BEGIN
    DELETE FROM sa_tablecache.watched AS w WHERE w.schema = of_schema AND w.name = of_name
    RETURNING w.logger INTO logger;
    IF FOUND THEN
        EXECUTE concat('DROP FUNCTION IF EXISTS sa_tablecache.', logger, '() CASCADE');
    END IF;
END
$unwatch$

-- For each of [[schema, name], ...]: what changes whenever DDL may have changed its rows or what is
-- logged of it, and what keeps its triggers from logging everything. STABLE, so that it sees what
-- the statement sees that calls it. The xmin of a catalog's row tells of each change of it, but not
-- of VACUUM, ANALYZE and CREATE INDEX, which overwrite rows in place.
CREATE OR REPLACE FUNCTION sa_tablecache.inspect(relations jsonb)
RETURNS TABLE (schema text, name text, fingerprint text, problem text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
SET quote_all_identifiers = off AS $inspect$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH asked AS MATERIALIZED (
        SELECT r.value ->> 0 AS schema, r.value ->> 1 AS name, c.oid, c.relkind,
            c.relpersistence, w.logger, w.definition, p.oid AS function,
            concat_ws(':', w.xmin, p.oid, p.xmin) AS registered
        FROM jsonb_array_elements(relations) AS r (value)
        LEFT JOIN pg_namespace AS n ON n.nspname = (r.value ->> 0)::name
        LEFT JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = (r.value ->> 1)::name
        LEFT JOIN sa_tablecache.watched AS w
            ON w.schema = r.value ->> 0 AND w.name = r.value ->> 1
        LEFT JOIN pg_proc AS p ON p.proname = w.logger::name
            AND p.pronamespace = 'sa_tablecache'::regnamespace
    )
    SELECT a.schema, a.name,
        md5(concat_ws('|', a.registered, tree.state, columns.state, rules.state, policies.state)),
        CASE
            WHEN a.oid IS NULL THEN 'there is no such table'
            WHEN a.relkind NOT IN ('r', 'p') OR a.relpersistence = 't'
                THEN 'it is not an ordinary table'
            WHEN a.logger IS NULL THEN 'it is not watched'
            WHEN a.function IS NULL THEN 'its trigger function is gone; watch it again'
            WHEN other.names IS NOT NULL THEN concat(
                'columns have gone, or are of another type than when it was watched: ',
                other.names, '; watch it again')
            WHEN tree.distant IS NOT NULL
                THEN concat('nobody sees changes of the foreign table ', tree.distant)
            WHEN tree.silent IS NOT NULL THEN concat(
                'triggers are missing or disabled on ', left(tree.silent, 200), '; watch it again')
            WHEN tree.subscribed IS NOT NULL THEN concat(
                'logical replication writes ', tree.subscribed, ', which fires no statement triggers')
        END
    FROM asked AS a
    LEFT JOIN LATERAL (
        SELECT
            string_agg(concat_ws(':', m.oid, f.inherited, m.xmin, m.relfilenode, t.state), ' '
                       ORDER BY m.oid, f.inherited) AS state,
            min(m.oid::regclass::text) FILTER (WHERE m.relkind NOT IN ('r', 'p')) AS distant,
            min(m.oid::regclass::text) FILTER (WHERE s.subscribed) AS subscribed,
            string_agg(DISTINCT m.oid::regclass::text, ', ') FILTER (WHERE t.fine < 4) AS silent
        FROM sa_tablecache.members(a.oid) AS f
        JOIN pg_class AS m ON m.oid = f.member
        CROSS JOIN LATERAL (
            SELECT count(DISTINCT t.tgtype) FILTER (
                    WHERE t.tgtype IN (4, 8, 16, 32) AND t.tgenabled = 'A' AND t.tgqual IS NULL
                        AND t.tgattr = '') AS fine,
                string_agg(concat_ws(':', t.oid, t.xmin), ' ' ORDER BY t.oid) AS state
            FROM pg_trigger AS t WHERE t.tgrelid = m.oid AND t.tgfoid = a.function
        ) AS t
        CROSS JOIN LATERAL (
            SELECT EXISTS (SELECT FROM pg_subscription_rel AS s WHERE s.srrelid = m.oid) AS subscribed
        ) AS s
    ) AS tree ON a.oid IS NOT NULL
    -- With the labels of enums, and what virtual columns are made of: those change without a trace
    -- in the column.
    LEFT JOIN LATERAL (
        SELECT string_agg(concat_ws(':', c.attnum, c.xmin, d.oid, d.xmin, e.oid, e.xmin), ' '
                          ORDER BY c.attnum, e.oid) AS state
        FROM pg_attribute AS c
        LEFT JOIN pg_attrdef AS d
            ON c.attgenerated <> '' AND d.adrelid = c.attrelid AND d.adnum = c.attnum
        LEFT JOIN LATERAL (
            SELECT e.oid, e.xmin FROM pg_type AS t
            JOIN pg_enum AS e ON e.enumtypid IN (t.oid, t.typelem, t.typbasetype)
            WHERE c.atttypid >= 16384 AND t.oid = c.atttypid
        ) AS e ON true
        WHERE c.attrelid = a.oid AND c.attnum > 0
    ) AS columns ON true
    LEFT JOIN LATERAL (
        SELECT string_agg(t.key, ', ' ORDER BY t.key) AS names
        FROM jsonb_each_text(a.definition -> 'types') AS t
        LEFT JOIN pg_attribute AS c
            ON c.attrelid = a.oid AND c.attname = t.key::name AND NOT c.attisdropped
        WHERE c.atttypid::regtype::text IS DISTINCT FROM t.value
    ) AS other ON true
    LEFT JOIN LATERAL (
        SELECT string_agg(concat_ws(':', r.oid, r.xmin), ' ' ORDER BY r.oid) AS state
        FROM pg_rewrite AS r WHERE r.ev_class = a.oid
    ) AS rules ON true
    LEFT JOIN LATERAL (
        SELECT string_agg(concat_ws(':', p.oid, p.xmin), ' ' ORDER BY p.oid) AS state
        FROM pg_policy AS p WHERE p.polrelid = a.oid
    ) AS policies ON true;
END
$inspect$

INSERT INTO sa_tablecache.meta (version) VALUES (1)
ON CONFLICT (one) DO UPDATE SET version = greatest(meta.version, excluded.version)

SELECT sa_tablecache.revive()

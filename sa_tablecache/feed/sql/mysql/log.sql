WHILE taken DO
        SET taken = FALSE;
        INSERT INTO sa_tablecache_changelog
            (at, writer, table_schema, table_name, operation, changed, bounds)
        VALUES (UTC_TIMESTAMP(), CONNECTION_ID(), {schema}, {name}, '{operation}', {changed}, {bounds});
    END WHILE;

"""What is known of SQL functions, by name."""

from __future__ import annotations

from typing import Any, Final

#: Functions whose result depends on the time, the session, or nothing at all.
VOLATILE_FUNCTIONS: Final = frozenset(
    """now random rand uuid gen_random_uuid uuid_generate_v1 uuid_generate_v4 uuidv4 uuidv7
    current_timestamp current_date current_time localtimestamp localtime clock_timestamp
    statement_timestamp transaction_timestamp timeofday sysdate getdate curdate curtime
    utc_timestamp utc_date unix_timestamp current_user session_user user current_role
    current_setting current_schema current_database database connection_id last_insert_id
    last_insert_rowid changes total_changes nextval currval lastval next_value setval to_char
    to_timestamp to_date age txid_current pg_backend_pid randomblob pg_sleep sleep rand_uuid
    inet_client_addr set_config""".split()
)

AGGREGATE_FUNCTIONS: Final = frozenset(
    """count sum avg min max array_agg string_agg group_concat json_agg jsonb_agg json_object_agg
    json_group_array json_group_object bool_and bool_or every bit_and bit_or stddev stddev_pop
    stddev_samp variance var_pop var_samp aggregate_strings total mode percentile_cont
    percentile_disc""".split()
)

#: Functions whose result depends on their arguments alone, on every supported database.
IMMUTABLE_FUNCTIONS: Final = AGGREGATE_FUNCTIONS | frozenset(
    """coalesce ifnull nullif greatest least abs ceil ceiling floor round trunc sign mod power pow
    sqrt exp ln log log10 sin cos tan asin acos atan atan2 pi degrees radians lower upper length
    char_length character_length octet_length substr substring trim ltrim rtrim btrim lpad rpad
    replace concat concat_ws reverse repeat left right position strpos instr initcap md5 ascii chr
    char hex unhex translate split_part timezone iif typeof json_extract json_array_length
    jsonb_array_length json_object json_array jsonb_build_object json_build_object cardinality
    array_length row_number rank dense_rank percent_rank cume_dist ntile lag lead
    first_value last_value nth_value cast bit_length make_date make_time div width_bucket""".split()
)

#: Functions that write nothing, whatever they return.
READING_FUNCTIONS: Final = (
    IMMUTABLE_FUNCTIONS
    | VOLATILE_FUNCTIONS
    | frozenset(
        """date_trunc date_part extract strftime date time datetime julianday version
        generate_series json_each json_tree jsonb_array_elements json_array_elements to_regclass
        to_jsonb to_json row_to_json format format_type pg_is_in_recovery pg_current_snapshot
        pg_table_is_visible pg_get_expr pg_get_constraintdef pg_get_indexdef obj_description
        col_description year month day hour minute second values in exists and or not as on using
        any all some filter over numeric decimal varchar char int integer float then when else
        case interval similarity count_distinct from where select by""".split()
    )
)


def function_name(element: Any) -> str:
    """Return a function's name, with its schema; that of its class if it has none."""
    name = str(getattr(element, "name", "") or type(element).__name__)
    return ".".join((*getattr(element, "packagenames", ()), name)).lower()

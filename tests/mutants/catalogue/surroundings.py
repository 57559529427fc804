"""Mistakes that are accepted, numbers that are wrong, and words that do not help."""

from tests.mutants.mutant import Mutant

SURROUNDINGS = (
    Mutant(
        name="arguments-unchecked",
        file="vllm_reroute/startup/engine_config.py",
        old="    check_arguments(engine_args)\n",
        new="",
        killers=("tests/unit/test_refusals.py::test_a_routed_engine_has_its_arguments_checked",),
    ),
    Mutant(
        name="finished-config-unchecked",
        file="vllm_reroute/startup/engine_config.py",
        old="    check_config(vllm_config)\n",
        new="",
        killers=("tests/unit/test_refusals.py::test_steps_too_small_for_any_image_are_refused",),
    ),
    Mutant(
        name="encoder-options-unchecked",
        file="vllm_reroute/startup/engine_config.py",
        old="        check_encoder_options(vllm_config)\n",
        new="        pass\n",
        killers=("tests/unit/test_nuwa_model.py::test_options_that_hide_the_encoder_are_refused",),
    ),
    Mutant(
        name="vllm-unchecked",
        file="vllm_reroute/startup/engine_config.py",
        old="    check_vllm()\n",
        new="",
        killers=("tests/unit/test_refusals.py::test_another_version_is_refused",),
    ),
    Mutant(
        name="refusal-without-its-cure",
        file="vllm_reroute/startup/refusals.py",
        old="Allowed: {self.allowed}. {self.cure}, or serve ",
        new="Allowed: {self.allowed}. Or serve ",
        killers=("tests/unit/test_refusals.py::test_refused",),
    ),
    Mutant(
        name="chat-unchecked",
        file="vllm_reroute/admission/front_end.py",
        old="                check_asked(request)\n",
        new="",
        killers=("tests/unit/test_admission.py::test_every_way_in_is_checked",),
    ),
    Mutant(
        name="completions-unchecked",
        file="vllm_reroute/admission/front_end.py",
        old="        check_request(request, self.vllm_config)\n",
        new="",
        killers=("tests/unit/test_admission.py::test_every_way_in_is_checked",),
    ),
    Mutant(
        name="engine-core-unchecked",
        file="vllm_reroute/admission/engine_core.py",
        old="        check_request(request, self.vllm_config)\n",
        new="",
        killers=("tests/unit/test_admission.py::test_every_way_in_is_checked",),
    ),
    Mutant(
        name="picture-known-before-it-was-sent",
        file="vllm_reroute/admission/sent_pictures.py",
        old="        self._unsent.add(mm_hash)\n",
        new="",
        killers=("tests/unit/test_admission.py::test_a_picture_counts_as_known_once_it_was_sent",),
    ),
    Mutant(
        name="lost-picture-thought-known",
        file="vllm_reroute/admission/sent_pictures.py",
        old="                self._give_up(mm_hash)\n            else:",
        new="                pass\n            else:",
        killers=(
            "tests/unit/test_admission.py::test_a_picture_lost_while_a_prompt_is_being_processed",
        ),
    ),
    Mutant(
        name="metric-counted-twice",
        file="vllm_reroute/metrics/counting.py",
        old="if request_id not in self._decided:",
        new="if request_id:",
        killers=("tests/unit/test_metrics.py::test_a_preempted_request_counts_once",),
    ),
    Mutant(
        name="metric-of-its-own-cache",
        file="vllm_reroute/metrics/counting.py",
        old="if not num_tokens or request.num_preemptions:",
        new="if not num_tokens:",
        killers=(
            "tests/unit/test_metrics.py::test_a_prompt_preempted_in_the_middle_is_not_under_way",
        ),
    ),
    Mutant(
        name="metrics-of-stock-engines",
        file="vllm_reroute/metrics/stat_logger.py",
        old="    if is_routed(vllm_config):\n",
        new="    if vllm_config:\n",
        killers=("tests/unit/test_metrics.py::test_an_engine_without_routing_shows_nothing_of_it",),
    ),
    Mutant(
        name="report-dies-of-a-tier",
        file="vllm_reroute/report.py",
        old="        except ValueError:\n            # A tier",
        new="        except KeyError:\n            # A tier",
        killers=("tests/unit/test_report.py::test_a_tier_that_cannot_be_met_is_left_out",),
    ),
    Mutant(
        name="calibrated-on-another-model",
        file="vllm_reroute/startup/calibrated.py",
        old="    calibrated.check_model(path, ModelIdentity.of(model, hf_config))\n",
        new="",
        killers=(
            "tests/unit/test_calibration_file.py::test_another_model_is_refused_with_the_cure",
        ),
    ),
    Mutant(
        name="changed-seam-accepted",
        file="vllm_reroute/vllm_seams/hook.py",
        old="if found != self.parameters:",
        new="if found is None:",
        killers=("tests/unit/test_patches.py::test_a_target_that_differs_is_refused",),
    ),
    Mutant(
        name="rooms-in-a-circle",
        file="vllm_reroute/families/table.py",
        old="def routed_name(",
        new="def _late() -> None:\n    from vllm_reroute import report  # noqa: F401\n\n\n"
        "def routed_name(",
        killers=("tests/unit/test_rooms.py",),
    ),
    Mutant(
        name="lines-of-one-colour",
        file="benchmarks/bench/plot.py",
        old='    "pdrop": "#d62728",\n',
        new='    "pdrop": "#1f77b4",\n',
        killers=("tests/unit/test_bench_report.py",),
    ),
)

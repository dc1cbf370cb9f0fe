"""Every option of PEFT's LoRA, of generation and of the Trainer, and what becomes of it under protection.

``equal``: as the plain model does it, and a case of `test_options` shows so, for one value of it at least. ``refused``:
by name, by `protect` or when it is used. ``none``: it does no arithmetic of the model's, or is another option's detail.
An option that a newer version brings is in none of these, and the test says so: somebody is to look at it.
"""


def table(equal: str, refused: str, none: str) -> dict[str, str]:
    found = dict.fromkeys(equal.split(), "equal")
    found |= dict.fromkeys(refused.split(), "refused")
    return found | dict.fromkeys(none.split(), "none")


LORA = table(
    equal="r lora_alpha use_rslora rank_pattern alpha_pattern init_lora_weights fan_in_fan_out target_modules"
    " exclude_modules layers_to_transform layers_pattern modules_to_save trainable_token_indices",
    # lora_dropout where its input is on the worker, bias where the layer leaves, by what they make of the model
    refused="use_dora lora_bias alora_invocation_tokens use_qalora layer_replication target_parameters use_bdlora"
    " arrow_config kasa_config monteclora_config velora_config megatron_config",
    # of the start alone: loftq, eva, corda and lora_ga; they are computed on the plain model
    none="lora_dropout bias loftq_config eva_config corda_config lora_ga_config ensure_weight_tying qalora_group_size"
    " runtime_config megatron_core task_type inference_mode base_model_name_or_path revision auto_mapping peft_type"
    " peft_version",
)

GENERATION = table(
    equal="do_sample temperature top_k top_p top_h min_p typical_p epsilon_cutoff eta_cutoff num_beams"
    " num_return_sequences early_stopping length_penalty repetition_penalty no_repeat_ngram_size guidance_scale"
    " bad_words_ids suppress_tokens begin_suppress_tokens sequence_bias use_cache prefill_chunk_size"
    " prompt_lookup_num_tokens max_new_tokens min_new_tokens renormalize_logits remove_invalid_values"
    " exponential_decay_length_penalty forced_eos_token_id output_scores output_logits output_hidden_states"
    " return_dict_in_generate encoder_repetition_penalty",
    refused="cache_implementation output_attentions",  # where the cache and the attention are on the worker
    # lengths and ends, the assistant's own, other files' code, and what torch.compile would be told
    none="_from_model_config assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight"
    " assistant_lookbehind bos_token_id cache_config compile_config constraints continuous_batching_config"
    " decoder_start_token_id disable_compile diversity_penalty dola_layers encoder_no_repeat_ngram_size eos_token_id"
    " force_words_ids forced_bos_token_id is_assistant low_memory max_cache_len max_length max_matching_ngram_size"
    " max_time min_length num_assistant_tokens num_assistant_tokens_schedule num_beam_groups pad_token_id penalty_alpha"
    " speculation_type stop_strings target_lookbehind token_healing transformers_version use_mtp watermarking_config",
)

TRAINING = table(
    equal="gradient_accumulation_steps max_grad_norm weight_decay learning_rate lr_scheduler_type warmup_steps"
    " label_smoothing_factor neftune_noise_alpha activation_checkpointing optim adam_beta1 adam_beta2 adam_epsilon"
    " per_device_train_batch_size max_steps seed bf16 eval_strategy",
    refused="torch_compile bf16_full_eval",
    # logs, files, processes, devices that the enclave does not have, and details of the options above
    none="average_tokens_across_devices accelerator_config activation_checkpointing_kwargs auto_find_batch_size"
    " batch_eval_metrics data_seed"
    " dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers"
    " dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers"
    " ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval"
    " do_predict do_train enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start"
    " eval_steps eval_use_gather_object fp16 fp16_full_eval fsdp fsdp_config full_determinism gradient_checkpointing"
    " gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id hub_private_repo hub_revision"
    " hub_strategy hub_token ignore_data_skip include_for_metrics include_num_input_tokens_seen label_names"
    " length_column_name liger_kernel_config load_best_model_at_end local_rank log_level log_level_replica"
    " log_on_each_node logging_first_step logging_nan_inf_filter logging_steps logging_strategy lr_scheduler_kwargs"
    " metric_for_best_model num_train_epochs optim_args optim_target_modules output_dir parallelism_config"
    " per_device_eval_batch_size prediction_loss_only project push_to_hub remove_unused_columns report_to"
    " restore_callback_states_from_checkpoint resume_from_checkpoint run_name save_on_each_node save_only_model"
    " save_steps save_strategy save_total_limit skip_memory_metrics tf32 torch_compile_backend torch_compile_mode"
    " torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id train_sampling_strategy"
    " use_cache use_cpu use_liger_kernel",
)
